"""The `urform` command: every verb calls one library function. Exit codes: 0 done, 1 failed, 2 wrong use or input.

Results go to stdout, everything else (progress, log, errors) to stderr. Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

from ..configuration.version_urform import VERSION
from ..dependencies import missing_dependency

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"urform: {missing_dependency(error.name or 'typer', 'the command line')}")

__all__ = ["app", "main"]

app = typer.Typer(
    name="urform",
    help="One Transformer for Hugging Face: train, evaluate, use, convert and publish it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Beams = Annotated[int, typer.Option("--num-beams", min=1, help="Beams of the search; 1 is greedy.")]
LengthPenalty = Annotated[float, typer.Option("--length-penalty", help="Exponent of the length in a beam's score.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Lines per batch.")]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Limit of one output.")]
Prefix = Annotated[str, typer.Option("--prefix", help="Prefix of every line, e.g. '<2de> '.")]
MaxLineBytes = Annotated[
    int, typer.Option("--max-line-bytes", min=0, help="Longest line that is accepted; 0: no limit.")
]
ModelDir = Annotated[Path, typer.Argument(help="Folder of a trained model (or of one checkpoint).")]


@contextmanager
def _clean_errors(debug: bool) -> Iterator[None]:
    """Print a short message on stderr, instead of a traceback, for every error that a user can correct."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        _fail("interrupted", 130)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if debug:
            raise
        _fail(str(error), 2)
    except (ImportError, OSError, RuntimeError) as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {' '.join(str(error).split())}", 1)  # a library's: one line


def _fail(message: str, code: int) -> None:
    lines = [line.rstrip() for line in message.splitlines() if line.strip()] or ["failed"]
    typer.echo("\n".join([f"urform: {lines[0].lstrip()}", *lines[1:]]), err=True)
    raise typer.Exit(code)


def _put(text: str) -> None:
    """Write a line of results. If the reader has closed the pipe (`| head -1`), exit without a message."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes the rest of the buffer when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(CLOSED_PIPE) from None


def _need_model(model_dir: Path) -> None:
    """Refuse a folder that holds no model before torch is imported."""
    if not model_dir.is_dir():
        raise FileNotFoundError(f"no such model folder: {model_dir}")


def _need_files(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")


@contextmanager
def _progress(total: int | None, what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=" lines", disable=quiet, file=sys.stderr) as bar:
        yield lambda count: bar.update(count) and None


def _set_up_logging(quiet: bool) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("urform").setLevel(logging.ERROR if quiet else logging.INFO)
    from transformers.utils import logging as transformers_logging

    if quiet:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _put(f"urform {VERSION} (transformers {version('transformers')}, torch {version('torch')})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the versions and exit.")
    ] = False,
) -> None:
    pass


def _recipe_names(incomplete: str) -> list[str]:
    from ..training.recipe import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


@app.command()
def demo(
    sentences: Annotated[
        list[str] | None, typer.Argument(help="Phrases to translate, e.g. '<2de> Friday, March 14, 2031'.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder for corpus and model.")] = Path(
        "outputs/demo"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value of the recipe: key=value; may be repeated.")
    ] = None,
    train_phrases: Annotated[int, typer.Option(min=10, help="Size of the training corpus.")] = 60_000,
    test_phrases: Annotated[int, typer.Option(min=1, help="Number of held-out phrases.")] = 600,
    debug: Debug = False,
) -> None:
    """Train a translator from scratch in a few minutes: dates, amounts and names, English to German and Chinese.

    The corpus is generated from CLDR (the Unicode locale data). No date, time or number in the test occurs in training.
    """
    with _clean_errors(debug):
        _set_up_logging(quiet=False)
        from ..training.demo import demo as run_demo

        run_demo(
            sentences or (),
            output_dir=output_dir,
            overrides=overrides or (),
            train_phrases=train_phrases,
            test_phrases=test_phrases,
            say=_put,
        )


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="YAML file, or the name of a recipe (see --list).", autocompletion=_recipe_names),
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to override: key=value, e.g. max_steps=100.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", "-o", help="Output folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint.")] = False,
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            help="With --resume: a setting that may differ from the run's, e.g. data or training.seed.",
        ),
    ] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List the recipes that come with urform.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model from a recipe.

    Ctrl-C saves a checkpoint and stops (exit code 130). The same command with --resume continues from there. On many
    processes: accelerate launch --num_processes N -m urform.cli.main train RECIPE ...
    """
    with _clean_errors(debug):
        from ..training.recipe import describe_recipes, list_recipes, read_recipe

        if list_names:
            described = describe_recipes()
            width = max(map(len, described))
            _put("\n".join(f"{name:{width}}  {description}" for name, description in described.items()))
            return
        if not recipe:
            raise ValueError(f"name a recipe: a YAML file or one of {', '.join(list_recipes())}")
        changes = [*(overrides or ()), *(["training.disable_tqdm=true"] if quiet else [])]
        read_recipe(recipe, changes, output_dir=output_dir)  # reports its faults before torch is imported
        _set_up_logging(quiet)
        from ..training.run import TrainingInterruptedError
        from ..training.run import train as run_train

        try:
            with redirect_stdout(sys.stderr):  # Trainer prints its log
                result = run_train(
                    recipe, changes, resume=resume, output_dir=output_dir, allow_changes=allow_changes or ()
                )
        except TrainingInterruptedError as interrupted:
            if debug:
                raise
            _fail(f"{interrupted}; the same command with --resume continues", 128 + interrupted.signal_number)
        summary = {"output_dir": str(result.output_dir), "steps": result.steps, **result.metrics}
        _put(json.dumps(summary, ensure_ascii=False, indent=1))


_LM_EVAL_ONLY = ("include_path", "num_fewshot", "limit")
_PARALLEL_ONLY = (
    "source",
    "target",
    "source_field",
    "target_field",
    "language",
    "output",
    "prefix",
    "num_beams",
    "length_penalty",
    "max_new_tokens",
    "max_line_bytes",
)


def _refuse_options(context: typer.Context, names: Sequence[str], lm_eval: bool) -> None:
    """Refuse what was given on the command line and would have no effect."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = name.upper() if name in ("source", "target") else "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} has no effect {'with' if lm_eval else 'without'} --lm-eval; leave it out"
                + (" (write --lm-eval once per task)" if option in ("SOURCE", "TARGET") else "")
            )


@app.command()
def evaluate(
    context: typer.Context,
    model_dir: ModelDir,
    source: Annotated[Path | None, typer.Argument(help="Source text, or one .tsv/.jsonl file with both sides.")] = None,
    target: Annotated[Path | None, typer.Argument(help="References, one per line.")] = None,
    source_field: Annotated[str, typer.Option(help="Column or field of the source.")] = "0",
    target_field: Annotated[str, typer.Option(help="Column or field of the reference.")] = "1",
    language: Annotated[str, typer.Option("--language", "-l", help="Target language, for the metrics.")] = "en",
    output: Annotated[Path | None, typer.Option("--output", help="Write the translations to this file.")] = None,
    prefix: Prefix = "",
    num_beams: Beams = 5,
    length_penalty: LengthPenalty = 1.0,
    batch_size: BatchSize = 64,
    max_new_tokens: MaxNewTokens = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option("--lm-eval", metavar="TASK", help="Task of lm-eval; may be repeated.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question of lm-eval.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of examples of each lm-eval task.")] = None,
    max_line_bytes: MaxLineBytes = 1_000_000,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score a model on a parallel test set: sacreBLEU, tokenized lower-cased BLEU, chrF, exact match, as JSON.

    With --lm-eval, score a decoder or an encoder-decoder on tasks of the Language Model Evaluation Harness instead.
    """
    with _clean_errors(debug):
        _refuse_options(context, _LM_EVAL_ONLY if lm_eval is None else _PARALLEL_ONLY, lm_eval is not None)
        _need_model(model_dir)
        if lm_eval is not None:
            _set_up_logging(quiet)
            from ..training.harness import evaluate_harness

            tasks = [name for names in lm_eval for name in names.split(",")]
            limits: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
            with redirect_stdout(sys.stderr):
                metrics = evaluate_harness(model_dir, tasks, include_path=include_path, **limits)
            _put(json.dumps(metrics, ensure_ascii=False, indent=1, default=float))
            return
        if source is None:
            raise ValueError("name a file to score the model on, or a task of lm-eval: --lm-eval TASK")
        _need_files(source, target)
        _set_up_logging(quiet)
        from ..training.data_files import read_parallel, read_records
        from ..training.evaluation import evaluate as run_evaluate

        pairs: list[Any]
        if target is None:
            pairs = list(read_records(source, [source_field, target_field], max_line_bytes=max_line_bytes or None))
        else:
            pairs = list(read_parallel(source, target, max_line_bytes or None))
        with _progress(len(pairs), "translating", quiet) as progress:
            result = run_evaluate(
                model_dir,
                pairs,
                language=language,
                prefix=prefix,
                num_beams=num_beams,
                length_penalty=length_penalty,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
        if output is not None:
            output.write_text("".join(f"{line}\n" for line in result.hypotheses), encoding="utf-8")
        _put(json.dumps(result.scores.to_dict(), ensure_ascii=False, indent=1))


@app.command()
def predict(
    model_dir: ModelDir,
    file: Annotated[
        Path | None,
        typer.Argument(help="Text with one input per line, .tsv or .jsonl (also .gz, .xz, .bz2); default: stdin."),
    ] = None,
    source_field: Annotated[str, typer.Option(help="Source column of a .tsv or field of a .jsonl.")] = "0",
    prefix: Prefix = "",
    num_beams: Beams = 5,
    length_penalty: LengthPenalty = 1.0,
    batch_size: BatchSize = 64,
    max_new_tokens: MaxNewTokens = None,
    max_line_bytes: MaxLineBytes = 1_000_000,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Translate stdin or a file to stdout, one output line per input line, in order. Empty lines stay empty."""
    with _clean_errors(debug):
        _need_model(model_dir)
        _need_files(file)
        _set_up_logging(quiet)
        from ..training.data_files import decode_lines, open_sources
        from ..training.translation import predict as run_predict

        if reconfigure := getattr(sys.stdout, "reconfigure", None):
            reconfigure(encoding="utf-8")
        name, limit = file or "standard input", max_line_bytes or None
        typed = decode_lines(sys.stdin.buffer, "standard input", limit)
        lines = typed if file is None else open_sources(file, source_field, limit)
        with _progress(None, "translating", quiet) as progress:
            for line in run_predict(
                model_dir,
                lines,
                prefix=prefix,
                num_beams=num_beams,
                length_penalty=length_penalty,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
                name=name,
            ):
                _put(line)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder written by save_pretrained or Trainer.")],
    repo_id: Annotated[str | None, typer.Option("--repo-id", help="NAMESPACE/NAME of the repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to upload to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    bundle_only: Annotated[
        Path | None,
        typer.Option("--bundle-only", help="Write the bundle into this folder and verify it; upload nothing."),
    ] = None,
    no_code: Annotated[
        bool, typer.Option("--no-code", help="Leave out the code; the model then needs urform installed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything except the upload.")] = False,
    card_data: Annotated[
        Path | None, typer.Option("--card-data", help="YAML for the model card, see docs/hub.md.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Publish a checkpoint on the Hub: check it, add code and a model card, verify it in clean processes, upload it."""
    with _clean_errors(debug):
        _set_up_logging(quiet)
        from ..hub_upload import publish

        address = publish(
            checkpoint,
            repo_id,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            bundle_only=bundle_only,
            code=not no_code,
            dry_run=dry_run,
            card_data=card_data,
            say=lambda line: None if quiet else typer.echo(line, err=True),
        )
        if address:
            _put(address)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint (safetensors).")],
    target: Annotated[Path, typer.Argument(help="Output folder.")],
    family: Annotated[
        str | None, typer.Option("--to", help="For a checkpoint of Urform: the family, e.g. llama; default its own.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of another family to Urform, or a Urform checkpoint to a family. One tensor at a time."""
    with _clean_errors(debug):
        _set_up_logging(quiet=True)
        from ..conversion.checkpoints import convert_checkpoint

        _put(str(convert_checkpoint(source, target, family, **({"revision": revision} if revision else {}))))


doctor = typer.Typer(
    help="Tests: this machine's kernels, whether a model keeps texts apart, a published bundle.", no_args_is_help=True
)
app.add_typer(doctor, name="doctor")
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@doctor.command()
def kernels(
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; default: the GPU, if there is one.")
    ] = None,
    backends: Annotated[list[str] | None, typer.Option("--backend", help="Only this backend; may be repeated.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Test every attention backend and the fused loss on this machine against float64; exit code 1 if one is wrong."""
    with _clean_errors(debug):
        _set_up_logging(quiet=True)
        from ..diagnostics.kernels_check import check_kernels

        report = check_kernels(device, backends=backends or None)
        _put(json.dumps(report.to_dict(), indent=1) if as_json else report.to_text())
        if not report.ok:
            raise typer.Exit(1)


@doctor.command()
def isolation(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of any model of transformers that reads tokens.")],
    attn: Annotated[str | None, typer.Option("--attn", help="attn_implementation; default: the model's own.")] = None,
    checks: Annotated[
        list[str] | None, typer.Option("--check", help="Only this check; may be repeated. See docs/doctor.md.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option("--device", help="cpu (default) or cuda.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Test whether padding, packed documents or later tokens change a model's outputs; exit code 1 if one does."""
    with _clean_errors(debug):
        _set_up_logging(quiet=True)
        from ..diagnostics.isolation import check_isolation

        report = check_isolation(
            model,
            attn_implementation=attn,
            checks=checks or None,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        _put(json.dumps(report.to_dict(), indent=1) if as_json else report.to_text())
        if not report.ok:
            raise typer.Exit(1)


@doctor.command()
def bundle(
    path_or_id: Annotated[str, typer.Argument(help="Folder or Hub id of a published checkpoint.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare every file of a published checkpoint with its stamp; exit code 1 if one was changed. Runs no code."""
    with _clean_errors(debug):
        _set_up_logging(quiet=True)
        from ..diagnostics.bundle import check_bundle

        report = check_bundle(path_or_id, revision)
        _put(json.dumps(report.to_dict(), indent=1) if as_json else report.to_text())
        if not report.ok:
            raise typer.Exit(1)


def main() -> None:
    """Entry point of the `urform` command."""
    app(prog_name="urform")


if __name__ == "__main__":
    main()
