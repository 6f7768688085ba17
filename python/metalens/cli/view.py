"""metalens view: show readings in a browser: from a server with a model behind it, or as a file."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

import click

from metalens.cli.common import FilePath, bos_option, embedding_option, force_option, lens_option, load_model, note, one_clear_error
from metalens.display.server.requests import Limits
from metalens.lenses.opening import files_read
from metalens.utils.errors import InvalidValueError, MetalensError
from metalens.utils.files import atomic_write, require_writable
from metalens.utils.outputs import Output, require_replaceable
from metalens.viewer.page import is_page

DEFAULTS = Limits()
MOST_TOP_K = 50  # on a served page: every token that is generated brings as many for each layer


@click.command("view")
@click.argument("model")
@lens_option
@click.option("--text", "texts", multiple=True, help="Text to read; give it twice to compare two.")
@click.option("--token", "tokens", multiple=True, help="Token to follow, such as ' Paris', or '#' and its id; may be repeated.")
@click.option("--save", "out", type=FilePath(), metavar="PAGE", help="Write the page as one file, for example out.html, in place of serving it.")
@click.option("--port", default=0, show_default="any free one", type=click.IntRange(0, 65535), help="Port of the server on 127.0.0.1.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the browser.")
@click.option("--max-tokens", default=DEFAULTS.max_tokens, show_default=True, type=click.IntRange(min=1), help="Tokens of the longest text.")
@click.option("--top-k", default=DEFAULTS.top_k, show_default=True, type=click.IntRange(min=1), help="Number of predictions in each cell.")
@click.option("--compare-layers", is_flag=True, help="With --save: also compare every layer with the next one, which takes longer than all the rest.")
@embedding_option
@bos_option
@force_option
@one_clear_error
def view_command(
    model: str,
    lens_path: Path | None,
    texts: tuple[str, ...],
    tokens: tuple[str, ...],
    out: Path | None,
    port: int,
    open_browser: bool,
    max_tokens: int,
    top_k: int,
    compare_layers: bool,
    embedding: bool,
    no_bos: bool,
    force: bool,
) -> None:
    """Show what every layer of MODEL predicts, in a browser.

    The page shows layers by tokens, colored by any statistic; texts are typed there, and continued live. With --save it is one file with the
    readings of --text, which opens anywhere. The server answers browsers of this machine only, and only at the address that it prints: that
    address has a key, which nobody can guess.
    """
    limits = Limits(max_tokens=max_tokens, top_k=top_k)
    if out is not None:
        if port or open_browser:
            raise InvalidValueError("--port and --open belong to the server; with --save there is none. Leave them out, or leave out --save.")
        _save(out, model, lens_path, texts, tokens, limits, compare_layers, embedding, no_bos, force)
        return
    if texts or tokens or compare_layers or no_bos or force:
        raise InvalidValueError("--text, --token, --compare-layers, --no-bos and --force belong to --save. On a served page, type and choose.")
    if top_k > MOST_TOP_K:
        raise InvalidValueError(f"--top-k {top_k} is too many for a served page. Choose at most {MOST_TOP_K}, or write a page with --save.")
    _serve(model, lens_path, limits, embedding, port, open_browser)


def _serve(name: str, lens_path: Path | None, limits: Limits, embedding: bool, port: int, open_browser: bool) -> None:
    from metalens.display.server.serving import listen, require_packages, serve
    from metalens.lenses.lens import TunedLens, lens_kind

    require_packages()
    lens = None if lens_path is None else TunedLens.load(lens_path)

    def load() -> object:
        from metalens.display.server.work import Session

        loaded = load_model(name)
        if lens is not None:
            loaded.check_lens(lens)
        return Session(loaded, [None] if lens is None else [None, lens], limits, embedding)

    def ready(address: str) -> None:
        note(f"The viewer is at {address} . Ctrl-C ends it.")
        if open_browser:
            import webbrowser

            webbrowser.open(address)

    with listen(port) as listening:
        note(f"Loading {name} ...")
        code = 1
        try:
            serve(load, name, ["logit lens"] if lens is None else ["logit lens", lens_kind(lens)], limits, listening, ready)
            code = 0
        except KeyboardInterrupt:
            code = 130  # as shells report Ctrl-C
        except (MetalensError, OSError) as error:
            note(f"Error: {error}")
        except Exception:  # a bug
            traceback.print_exc()
        finally:  # `serve` says why. There is nothing left to write or to close.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def _save(
    out: Path,
    name: str,
    lens_path: Path | None,
    texts: tuple[str, ...],
    tokens: tuple[str, ...],
    limits: Limits,
    compare_layers: bool,
    embedding: bool,
    no_bos: bool,
    force: bool,
) -> None:
    from metalens.display.pages import reading_page
    from metalens.lenses.lens import TunedLens

    if not 1 <= len(texts) <= 2:
        raise InvalidValueError("--save needs one --text, or two to compare.")
    require_writable(out)
    require_replaceable([Output(out, "a page of the viewer", is_page)], force=force, inputs=[] if lens_path is None else files_read(lens_path))
    lens = None if lens_path is None else TunedLens.load(lens_path)
    loaded = load_model(name)
    inputs = [loaded.encode(text, bos=not no_bos) for text in texts]
    for ids in inputs:
        if len(ids) > limits.max_tokens:
            raise InvalidValueError(
                f"The text has {len(ids):,} tokens; the page holds at most {limits.max_tokens:,}. Shorten it, or give --max-tokens."
            )
    content = reading_page(
        loaded,
        inputs,
        lens,
        title=name,
        tokens=[_token(token) for token in tokens],
        top_k=limits.top_k,
        compare_layers=compare_layers,
        embedding=embedding,
    )
    with atomic_write(out) as temporary:
        temporary.write_text(content, encoding="utf-8")
    note(f"Page written to {out}.")


def _token(named: str) -> str | int:
    """Return the token that an option names: '#' and an id, or a text."""
    return int(named[1:]) if named[:1] == "#" and named[1:].isdigit() else named
