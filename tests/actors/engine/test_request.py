"""Stop strings across token borders."""

import random

from actors.engine.request import StopStrings


def run(text: str, stops: list[str], cuts: list[int]) -> tuple[str, bool]:
    checker = StopStrings(stops)
    shown = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part, stopped = checker.push(text[start:end])
        shown += part
        assert not any(stop in shown for stop in stops)
        if stopped:
            return shown, True
    return shown + checker.flush(), False


def test_text_ends_before_a_stop_string_wherever_it_is_cut() -> None:
    text = "answer: 42\n\nQ: next"
    for cut in range(1, len(text)):
        assert run(text, ["\n\nQ:"], [cut]) == ("answer: 42", True)


def test_what_might_begin_a_stop_string_is_held_until_it_is_certain() -> None:
    checker = StopStrings(["###"])
    assert checker.push("a#") == ("a", False)
    assert checker.push("#") == ("", False)
    assert checker.push("b##") == ("##b", False)
    assert checker.flush() == "##"


def test_the_result_does_not_depend_on_where_tokens_end() -> None:
    draw = random.Random(2)
    stopped = 0
    for _ in range(3000):
        text = "".join(draw.choice("ab") for _ in range(draw.randrange(1, 14)))
        stops = ["".join(draw.choice("ab") for _ in range(draw.randrange(1, 5))) for _ in range(draw.randrange(1, 4))]
        expected = run(text, stops, list(range(1, len(text))))
        cuts = sorted(draw.sample(range(1, len(text) + 1), draw.randrange(len(text))))
        assert run(text, stops, cuts) == expected, (text, stops, cuts)
        stopped += expected[1]
    assert 500 < stopped < 2900


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings([]).push("anything") == ("anything", False)
