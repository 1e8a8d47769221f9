"""Model folders of all kinds as they answer an evaluation, against plain forward passes."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from configs.errors import ConfigError, ContractError
from configs.schema.tasks import Answering
from pipelines.evaluation.local_models import LocalModel, shared_out
from tests.actors.conftest import MakeModel, make_model, tokenizer_folder
from tests.actors.engine.conftest import MakeEncoder, MakeSeq2Seq, make_encoder, make_seq2seq

__all__ = ["make_encoder", "make_model", "make_seq2seq", "tokenizer_folder"]


def load(folder, *, chat: bool = False) -> LocalModel:
    return LocalModel.load(folder, max_sequences=4, chat=chat)


@functools.cache
def naive(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def naive_logprob(folder, ids: list[int], count: int) -> float:
    model = naive(folder)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return float(logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[-count:].sum())


def test_a_continuation_is_as_likely_as_a_plain_forward_pass_finds_it(make_model: MakeModel) -> None:
    folder = make_model()
    model = load(folder)
    encode = model._engine.text.encode
    (answer,) = model.likelihoods([("def f(x):  ", ["return x", " pass"])])
    for continuation, found in zip(("  return x", "   pass"), answer.logprobs, strict=True):
        ids, before = encode("def f(x):" + continuation), encode("def f(x):")
        assert found == pytest.approx(naive_logprob(folder, ids, len(ids) - len(before)), abs=1e-4)
    (empty,) = model.likelihoods([("", ["return"])])
    ids = encode("return")
    assert empty.logprobs[0] == pytest.approx(naive_logprob(folder, [0, *ids], len(ids)), abs=1e-4)


def test_a_prompt_beyond_the_window_loses_its_beginning_and_says_so(make_model: MakeModel) -> None:
    folder = make_model()
    model = load(folder)
    encode = model._engine.text.encode
    long = "x = 1\n" * 100 + "def"
    (answer,) = model.likelihoods([(long, [" pass"])])
    ids = encode(long + " pass")[-97:]  # the window's 96, and the one that is predicted last
    assert answer.truncated
    assert answer.logprobs[0] == pytest.approx(naive_logprob(folder, ids, len(encode(" pass"))), abs=1e-4)
    whole, short = model.generate([long, "x"], Answering(max_new_tokens=5))
    assert (whole.truncated, short.truncated) == (True, False)
    assert whole.prompt_tokens == 96 - 5
    tail = model._engine.text.decode(encode(long)[-91:])
    assert model.generate([tail], Answering(max_new_tokens=5))[0].texts == whole.texts


def test_a_short_stride_gives_each_token_more_before_it(make_model: MakeModel) -> None:
    folder = make_model()
    model = load(folder)
    text = "for i in range(10):\n    print(i)\n" * 6
    ids = [0, *model._engine.text.encode(text)]
    expected = sum(naive_logprob(folder, ids[max(0, n - 96) : n + 1], 1) for n in range(1, len(ids)))
    (sliding,), (disjoint,) = model.documents([text], 1), model.documents([text], None)
    assert sliding.tokens == disjoint.tokens == len(ids) - 1
    assert sliding.logprobs[0] == pytest.approx(expected, abs=1e-2)
    assert sliding.logprobs[0] != pytest.approx(disjoint.logprobs[0], abs=1e-2)
    with pytest.raises(ConfigError, match="stride"):
        model.documents([text], 97)


def test_an_answer_longer_than_the_window_is_read_in_windows(make_model: MakeModel) -> None:
    folder = make_model()
    model = load(folder)
    before, after = model._pair("def f(x):", " return x + 1" * 30)
    assert len(after) > 96
    (answer,) = model.likelihoods([("def f(x):", [" return x + 1" * 30, " pass"])])
    ids = [*before, *after]
    first = naive_logprob(folder, ids[: len(before) + 96][-97:], 96)
    assert answer.logprobs[0] == pytest.approx(first + naive_logprob(folder, ids[-97:], len(after) - 96), abs=1e-2)
    assert (answer.truncated, answer.tokens) == (True, len(after) + len(model._pair("def f(x):", " pass")[1]))


def test_a_long_answer_leaves_the_prompt_at_least_half_the_window(make_model: MakeModel) -> None:
    assert shared_out(list(range(10)), 5, 96) == (list(range(10)), 5)
    assert shared_out(list(range(200)), 5, 96) == (list(range(109, 200)), 5)
    assert shared_out(list(range(30)), 200, 96) == (list(range(30)), 66)
    assert shared_out(list(range(200)), 200, 96) == (list(range(152, 200)), 48)
    model = load(make_model())
    (answer,) = model.generate(["def f(x):"], Answering(max_new_tokens=500))
    assert (answer.truncated, answer.prompt_tokens) == (False, len(model._engine.text.encode("def f(x):")))


def test_conversations_go_through_the_chat_template(make_model: MakeModel) -> None:
    folder = make_model()
    model = load(folder, chat=True)
    asked = [{"role": "user", "content": "Hello"}]
    rendered = model._engine.text.render_chat(asked)
    assert model.talks
    assert model.generate([asked], Answering(max_new_tokens=3))[0].prompt_tokens == len(rendered)
    (answer,) = model.likelihoods([(asked, ["return x", "pass"])])
    for choice, found in zip(("return x", "pass"), answer.logprobs, strict=True):
        ids = model._engine.text.encode(choice)
        assert found == pytest.approx(naive_logprob(folder, [*rendered, *ids], len(ids)), abs=1e-4)
    with pytest.raises(ConfigError, match="not of conversations"):
        model.documents(["Hello"], None)


def test_an_encoder_classifies_with_its_head_and_in_the_order_of_the_tasks_choices(make_encoder: MakeEncoder) -> None:
    folder = make_encoder("roberta", "ForSequenceClassification", ("no", "yes"))
    texts = ["return x", "print(hello)", ""]
    found = load(folder).classify(texts, ("yes", "no"))
    tokenizer, model = (c.from_pretrained(folder) for c in (AutoTokenizer, AutoModelForSequenceClassification))
    with torch.no_grad():
        expected = [
            model.eval()(**tokenizer(text or " ", return_tensors="pt")).logits[0].log_softmax(-1) for text in texts
        ]
    for answer, (no, yes) in zip(found, expected, strict=True):
        assert answer.logprobs == pytest.approx((float(yes), float(no)), abs=1e-4)
    with pytest.raises(ContractError, match="classes"):
        load(folder).classify(texts, ("positive", "negative"))
    with pytest.raises(ConfigError, match="can tag"):
        load(folder).tag([["a"]])


def test_an_encoder_tags_words_as_they_are_given(make_encoder: MakeEncoder) -> None:
    folder = make_encoder("roberta", "ForTokenClassification", ("O", "B-x", "I-x"))
    model = load(folder)
    words = ["don't", "print(x)", "naïve", "x"]
    (answer,) = model.tag([words])
    (event,) = model._read(model._engine, [" ".join(words)], "tag")
    covering = [next(p.label for p in event.encoding.words if p.start <= start < p.end) for start in (0, 6, 15, 21)]
    assert list(answer.tags) == covering
    (cut,) = model.tag([["word"] * 300])
    assert (cut.truncated, len(cut.tags), cut.tags[-1]) == (True, 300, "O")


def test_an_encoder_decoder_answers_and_a_task_it_cannot_do_is_refused(make_seq2seq: MakeSeq2Seq) -> None:
    model = load(make_seq2seq("t5"))
    answers = model.generate(["def f(x):", "x " * 600], Answering(max_new_tokens=4))
    assert [answer.tokens for answer in answers] == [4, 4]
    assert [answer.truncated for answer in answers] == [False, True]
    with pytest.raises(ConfigError, match="likelihoods"):
        model.likelihoods([("a", ["b"])])
