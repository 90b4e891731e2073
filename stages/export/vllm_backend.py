"""Whether vLLM can serve an exported folder by its Transformers modeling backend.

What the backend asks for is in vLLM's documentation ("Writing custom models" of its supported models); the classes that
exports carry do it. What is left depends on the student.
"""

from transformers import LlavaProcessor, PreTrainedModel, ProcessorMixin

from stages.student.model.student import OWN_CLASSES


def let_llava_count(processor: ProcessorMixin) -> None:
    """Lets a LLaVA processor count the tokens of a picture that it does not crop, as with a SigLIP tower.

    It counts by `crop_size`, which an image processor without cropping need not have, and then does not use.
    """
    images = processor.image_processor
    if isinstance(processor, LlavaProcessor) and not getattr(images, "do_center_crop", False):
        images.crop_size = dict(images.size)


def why_not_vllm(model: PreTrainedModel, processor: ProcessorMixin) -> str | None:
    """Why vLLM cannot serve a model of this project's classes, as a part of a sentence; None where it can.

    Of a class of transformers nothing is known here: vLLM has many of them itself.
    """
    if not isinstance(model, OWN_CLASSES):
        return None
    if getattr(model.config, "deepstack", 0):
        return "it adds image features inside its decoder (deepstack), and vLLM puts them before it only"
    try:
        processor._get_num_multimodal_tokens(image_sizes=[(64, 96)])  # height, width
    except (AttributeError, TypeError):
        return f"`{type(processor).__name__}` of transformers cannot count the tokens of a picture before it is read"
    return None
