"""`ganymede inspect`: what a model makes of a text: its tokens, the next one, the attention, the embeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.files import write_file
from infra.cli.models import MODEL_HELP, find_model_folder, find_tokenizer_folder
from infra.cli.output import Debug, Json, err, print_json, print_table, say
from infra.local import route_logs, state_home

if TYPE_CHECKING:
    from configs.schema.generation import Sampling
    from pipelines.prompting.attention_maps import AttentionMaps
    from pipelines.prompting.next_token import NextToken
    from pipelines.prompting.token_cuts import TextCut

app = typer.Typer(
    help="What a model makes of a text: tokens, next token, attention, embeddings; as tables, JSON and pictures.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Chat = Annotated[bool, typer.Option("--chat", help="Put the text into the chat template, as a user's message.")]
Png = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw it here.")]

_OWN = "the model"
_TEMPERATURES, _TOP_K, _TOP_P, _MIN_P = (0.5, 1.5), 5, 0.9, 0.1
"""What is shown to somebody who names no control."""


@app.command("next-token")
def next_token(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")],
    chat: Chat = False,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=100.0, help="Below 1 sharpens, above 1 flattens; 0 is greedy. Can be repeated."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.001, max=1.0, help="Draw from the likeliest tokens that have this mass.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the likeliest one's.")
    ] = None,
    show: Annotated[int, typer.Option(min=1, max=100, help="How many of the likeliest tokens.")] = 12,
    png: Png = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows the distribution of the next token, and what each control of the sampling leaves of it.

    Without controls it shows some of each kind. Those you name are shown one by one, and then all together in the
    order the engine applies them: temperature, top-k, top-p, min-p. The last column is greedy decoding.

    Example: ganymede inspect next-token demo@champion --prompt "def add(a, b):" --temperature 0.7 --top-p 0.9
    """
    home = _begin()
    views = _views(temperature or [], top_k, top_p, min_p)
    text = _given(prompt)
    with err().status(f"reading {model}"):
        from actors.text import Text
        from pipelines.prompting.next_token import next_token as read
        from pipelines.prompting.next_token import prompt_logits

        found = find_model_folder(model, home)
        _require_decoder(found.folder)
        opened = Text.load(found.folder)
        ids = opened.render_chat([{"role": "user", "content": text}]) if chat else opened.encode(text)
        result = read(prompt_logits(found.folder, ids), ids, opened, views, shown=show)
    if png is not None:
        from pipelines.prompting.pictures import next_token_picture

        write_file(png, next_token_picture(result))
    if as_json:
        print_json({"model": found.name, "digest": found.digest, "prompt": text, **result.model_dump()})
        return
    _print_next_token(result)


@app.command()
def tokens(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Models or tokenizers to compare: as in --help of generate, or tokenizer/NAME@VERSION.",
        ),
    ],
    text: Annotated[str, typer.Option("--text", "-t", help="Text to cut; - reads standard input.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows how a text is cut into tokens: ids, pieces, bytes and characters; several tokenizers side by side.

    Fewer tokens for the same text mean a shorter prompt and a faster answer. A character that the vocabulary does not
    have is cut into bytes, in brackets here.

    Example: ganymede inspect tokens tokenizer/demo-tokenizer@1 --text "def add(a, b): return a + b"
    """  # fmt: skip
    home = _begin()
    from pipelines.prompting.token_cuts import cut_text

    given = _given(text)
    cuts = {}
    for model in models:
        found = find_tokenizer_folder(model, home)
        cuts[found.name] = cut_text(found.folder, given)
    if as_json:
        print_json({"text": given, "tokenizers": {
            name: {**cut.model_dump(), "bytes_per_token": cut.bytes_per_token} for name, cut in cuts.items()
        }})  # fmt: skip
        return
    _print_cuts(cuts, given)


@app.command()
def attention(
    model: Model,
    text: Annotated[str, typer.Option("--text", "-t", help="Text to read (an encoder-decoder's source); - is stdin.")],
    pair: Annotated[str | None, typer.Option(help="A second text, for encoders that judge two together.")] = None,
    target: Annotated[
        str | None, typer.Option(help="What an encoder-decoder writes; its own greedy answer if left out.")
    ] = None,
    chat: Chat = False,
    layer: Annotated[int | None, typer.Option(min=0, help="Draw this layer only, counted from 0.")] = None,
    head: Annotated[int | None, typer.Option(min=0, help="Draw this head only, counted from 0.")] = None,
    png: Png = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with all maps, to point at.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draws which tokens each token is made of, by layer and head; for decoders, encoders and encoder-decoders.

    The table says what each head does: how much it looks at the first token (where heads rest), at the token itself
    and the one before, and its entropy in bits (0: at one token). An encoder-decoder has three kinds of maps; --png
    writes one file of each, FILE-encoder.png and so on. With --layer and --head, the tokens' names are drawn too.

    Example: ganymede inspect attention demo@champion --text "def add(a, b): return a" --html attention.html
    """
    home = _begin()
    with err().status(f"reading {model}"):
        from pipelines.prompting.attention_maps import head_summaries, read_attention

        found = find_model_folder(model, home)
        maps = read_attention(found.folder, _given(text), pair=pair, target=target, chat=chat)
    _check_place(maps, layer, head)
    if png is not None:
        from pipelines.prompting.pictures import attention_picture

        for one in maps:
            path = png if len(maps) == 1 else png.with_stem(f"{png.stem}-{one.kind}")
            write_file(path, attention_picture(one, layer=layer, head=head))
    if page is not None:
        from pipelines.prompting.attention_page import attention_page

        write_file(page, attention_page(maps, found.name).encode())
    summaries = {one.kind: head_summaries(one) for one in maps}
    if as_json:
        print_json({"model": found.name, "digest": found.digest, "maps": {
            one.kind: {
                "queries": one.queries,
                "keys": one.keys,
                "heads": [summary.model_dump() for summary in summaries[one.kind]],
                "weights": one.weights_LHQK.round(6).tolist(),
            }
            for one in maps
        }})  # fmt: skip
        return
    for kind, heads in summaries.items():
        rows = [
            (str(h.layer), str(h.head), _share(h.first), _share(h.same), _share(h.previous), f"{h.entropy_bits:.2f}")
            for h in heads
            if layer in (None, h.layer) and head in (None, h.head)
        ]
        columns = ("# layer", "# head", "# first token", "# itself", "# token before", "# entropy, bits")
        print_table(columns, rows, title=f"{kind} attention")
    if png is None and page is None:
        say("--html FILE writes a page with every map, --png FILE a picture")


@app.command()
def embeddings(
    model: Model,
    words: Annotated[list[str], typer.Argument(metavar="WORD...", help="Words; a leading space counts.")],
    count: Annotated[int, typer.Option("--neighbours", "-n", min=1, max=100, help="Nearest tokens of each.")] = 8,
    png: Png = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows the tokens whose input embeddings are nearest to a word's by cosine, and draws them in two dimensions.

    A word that is cut into several tokens stands for the mean of their vectors. The picture shows the two directions
    in which the words and their neighbours differ most (principal components).

    Example: ganymede inspect embeddings demo@champion " return" " True" " list" --png words.png
    """
    home = _begin()
    with err().status(f"reading {model}"):
        from actors.text import Text
        from pipelines.prompting.neighbours import input_embeddings, neighbours

        found = find_model_folder(model, home)
        view = neighbours(input_embeddings(found.folder), Text.load(found.folder), words, count=count)
    if png is not None:
        from pipelines.prompting.pictures import embeddings_picture

        write_file(png, embeddings_picture(view))
    if as_json:
        print_json({"model": found.name, "digest": found.digest, **view.model_dump()})
        return
    from pipelines.prompting.token_cuts import visible

    for word in view.words:
        cut = "" if len(word.token_ids) == 1 else f" (mean of {len(word.token_ids)} tokens)"
        rows = [(visible(n.text), str(n.id), f"{n.cosine:.3f}") for n in word.neighbours]
        print_table(("token", "# id", "# cosine"), rows, title=visible(word.word) + cut)


def _begin() -> Path:
    home = state_home()
    route_logs(home)
    return home


def _given(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _require_decoder(folder: Path) -> None:
    from actors.engine.loading import runner_kind
    from configs.errors import RequestError

    kind = runner_kind(folder)
    if kind != "decoder":
        raise RequestError(
            "only a decoder continues a prompt token by token", param="MODEL", received=kind, allowed="decoder",
            next_step="ganymede inspect attention shows what other models do with a text",
        )  # fmt: skip


def _views(
    temperatures: list[float], top_k: int | None, top_p: float | None, min_p: float | None
) -> dict[str, Sampling]:
    """Settings by name of the column: the model's own, each control alone, all of them together, greedy."""
    from configs.schema.generation import Sampling

    controls: dict[str, dict[str, float]] = {f"temperature {value:g}": {"temperature": value} for value in temperatures}
    for name, field, value in (("top-k", "top_k", top_k), ("top-p", "top_p", top_p), ("min-p", "min_p", min_p)):
        if value is not None:
            controls[f"{name} {value:g}"] = {field: value}
    if not controls:
        return _views(list(_TEMPERATURES), _TOP_K, _TOP_P, _MIN_P)
    views = {_OWN: Sampling()} | {name: Sampling.model_validate(values) for name, values in controls.items()}
    together: dict[str, float] = {}
    for values in controls.values():
        together |= values
    if len(together) > 1 and len(temperatures) < 2:
        views["together"] = Sampling.model_validate(together)
    return views | {"greedy": Sampling(temperature=0)}


def _print_next_token(result: NextToken) -> None:
    from pipelines.prompting.token_cuts import visible

    columns = ("token", "# id", "# logit", *(f"# {name}" for name in result.views))
    rows = [
        (visible(c.text), str(c.id), f"{c.logit:.2f}", *(f"{p:.2%}" if p else "-" for p in c.probabilities.values()))
        for c in result.candidates
    ]
    views, blank = list(result.views.values()), ("", "")
    rows.append(("tokens kept", *blank, *(f"{view.tokens_kept:,}" for view in views)))
    rows.append(("entropy, bits", *blank, *(f"{view.entropy_bits:.2f}" for view in views)))
    rows += [
        (f"seed {seed} draws", *blank, *(visible(view.drawn[seed], 12) for view in views))
        for seed in range(len(views[0].drawn))
    ]
    print_table(columns, rows)
    say(
        f"{result.prompt_tokens} prompt tokens; tokens not shown have {result.other_probability:.1%} of the model's own"
    )


def _print_cuts(cuts: dict[str, TextCut], text: str) -> None:
    from pipelines.prompting.token_cuts import shown_pieces, visible

    columns = ("tokenizer", "# tokens", "# bytes per token", "# vocabulary", "text restored")
    rows = []
    for name, cut in cuts.items():
        figures = (f"{len(cut.tokens):,}", f"{cut.bytes_per_token:.2f}", f"{cut.vocabulary:,}")
        rows.append((name, *figures, "yes" if cut.restored else "no"))
    print_table(columns, rows)
    for name, cut in cuts.items():
        pieces = [f"[{visible(run)}]" if whole else visible(run) for run, whole in shown_pieces(cut, text)]
        typer.echo(f"\n{name}\n{'|'.join(pieces)}")
    for name, cut in cuts.items():
        typer.echo()
        print_table(
            ("#", "# id", "piece", "bytes", "# characters"),
            [
                (str(n), str(t.id), t.piece, t.bytes_hex, "added" if t.added else f"{t.begin}-{t.end}")
                for n, t in enumerate(cut.tokens)
            ],
            title=name,
        )


def _check_place(maps: tuple[AttentionMaps, ...], layer: int | None, head: int | None) -> None:
    from configs.errors import RequestError

    for name, asked, axis in (("--layer", layer, 0), ("--head", head, 1)):
        there = min(one.weights_LHQK.shape[axis] for one in maps)
        if asked is not None and asked >= there:
            raise RequestError(f"{name}: the model has no such one", param=name, received=asked,
                               allowed=f"0 to {there - 1}")  # fmt: skip


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
