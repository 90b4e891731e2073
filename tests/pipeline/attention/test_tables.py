"""Tables of a comparison say whose numbers they are and what they are of."""

from pipeline.attention.report import AttentionReport, StudentAttention
from pipeline.attention.tables import attention_tables
from stages.evaluation.attention.similarity import AttentionSimilarity
from stages.evaluation.attention.tally import LayerMeasures

MEASURES = LayerMeasures(layers=((0,),), between_images=(None,))
REPORT = AttentionReport(
    num_samples=7,
    num_images=5,
    num_without_image=2,
    text="left",
    num_with_text=4,
    num_images_with_text=3,
    num_object_pictures=0,
    num_with_objects=0,
    teacher_is_live=True,
    teacher=MEASURES,
)


def test_the_title_counts_samples_with_the_word_and_those_left_out() -> None:
    (table,) = attention_tables(REPORT)
    assert "7 samples about 5 images, the teacher's run on them; 2 without an image left out" in table.title
    assert "'left' in 4 samples about 3 images" in table.title


def test_a_student_called_teacher_takes_no_row_of_the_teacher() -> None:
    similarity = AttentionSimilarity(
        student_layers=(), windows=(), layers_from="default", similarity=(), alignment_loss=(), num_samples=0
    )
    student = StudentAttention(similarity=similarity, intervals=(), mean=None, measures=MEASURES, samples={})
    tables = attention_tables(REPORT.model_copy(update={"students": {"teacher": student}}))
    assert [row[0] for row in tables[-1].rows] == ["teacher", "teacher"]
