"""An independent reading of captions: words and positions alone, none of the example's own logic."""

import re

from pipeline.demo.scenes import world


def reads_as_true(caption: str, things: list[world.Thing], slack: float) -> bool:
    """Whether two objects fit the caption; `slack` pixels are forgiven (or, when negative, demanded)."""
    pattern = r"a ((?:small |large )?\w+ \w+) (left of|right of|above|below) a ((?:small |large )?\w+ \w+)"
    match = re.fullmatch(pattern, caption)
    assert match, f"not a caption: {caption}"
    first, relation, second = match.groups()

    def fits(words: str, thing: world.Thing) -> bool:
        *size, colour, noun = words.split()
        return (colour, noun) == (thing.colour, thing.noun) and size in ([], [thing.size])

    for one in things:
        for two in things:
            gap = {
                "left of": two.x - one.x,
                "right of": one.x - two.x,
                "above": two.y - one.y,
                "below": one.y - two.y,
            }[relation]
            if one != two and fits(first, one) and fits(second, two) and gap > -slack:
                return True
    return False


def scenes_and_things(variant: world.Variant, num: int = 200) -> list[list[world.Thing]]:
    scenes = world.sample_scenes(world.generator(11, 7), num, variant, "heldout")
    return [scenes.things(index) for index in range(num)]
