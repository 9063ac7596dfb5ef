"""A run's export on the Hugging Face Hub, with a card of what it is."""

from __future__ import annotations

from pathlib import Path

from jaxrl import __version__, config
from jaxrl.errors import InputError, RunError, first_line
from jaxrl.files import is_hub_id
from jaxrl.report.figures import report
from jaxrl.report.markdown import table
from jaxrl.telemetry.services import versions
from jaxrl.types import Say

SOURCE = "https://arxiv.org/abs/2512.16649"  # JustRL


def files_of(run: Path, exported: Path, step: int, repository: str) -> dict[str, Path | bytes]:
    """What a repository of this export has, by name: the model, its card, the recipe, the curves.

    Args:
      run: the run folder.
      exported: its Hugging Face folder.
      step: steps that were trained.
      repository: ORG/NAME.

    Raises:
      InputError: if the run has no metrics or recipe that can be read.
    """
    written = {path.name: path for path in report([run])}
    found: dict[str, Path | bytes] = {
        path.relative_to(exported).as_posix(): path for path in sorted(exported.rglob("*")) if path.is_file()
    }
    recipe = config.load(run / "recipe.toml")
    summary = written["summary.md"].read_text(encoding="utf-8")
    pictures: dict[str, Path | bytes] = {
        name: written[name] for name in ("training.png", "benchmarks.png") if name in written
    }
    card = model_card(recipe, step, repository, summary, list(pictures))
    return {**found, **pictures, "recipe.toml": run / "recipe.toml", "README.md": card.encode()}


def model_card(recipe: config.Recipe, step: int, repository: str, summary: str, pictures: list[str]) -> str:
    """The card: base model and data for the Hub's search, how to load it, what differs from JustRL, results, curves."""
    base, data = recipe.model.path, [source.path for source in recipe.data.sources] or [recipe.data.path]
    on_hub = [name for name in data if _on_hub(name)]
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {base}"] * _on_hub(base)
    head += ["datasets:", *(f"- {name}" for name in on_hub)] if on_hub else []
    head += ["tags:", "- jaxrl", "- grpo", "- reinforcement-learning", "---", ""]
    code = ", ".join(f"{name} {value}" for name, value in versions().items())
    text = [f"# {repository.partition('/')[2]}", ""]
    text += [
        f"`{base}` after {step:,} steps of reinforcement learning on `{', '.join(data)}`, by {code}.",
        "",
    ]
    text += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    text += [f'model = AutoModelForCausalLM.from_pretrained("{repository}")']
    text += [f'tokenizer = AutoTokenizer.from_pretrained("{repository}")', "```", ""]
    text += [f"`jaxrl train recipe.toml` trains it again. Beside [JustRL]({SOURCE})'s, the recipe has"]
    own = [line.partition(": ") for line in config.differences(config.Recipe(), recipe)]
    shown = [(f"`{key}`", *values.split(" -> ", 1)) for key, _, values in own if not key.startswith(_LOCAL)]
    text += table(("", "JustRL", "here"), [[cell.replace("|", "\\|") for cell in row] for row in shown])
    text += ["", *(f"![{name}]({name})" for name in pictures), "", summary]
    return "\n".join(head + text)


# Of a machine, not of an experiment.
_LOCAL = (
    "run.directory",
    "run.compilation_cache",
    "run.trackers",
    "run.project",
    "sampler.urls",
    "model.path",
)


def push(files: dict[str, Path | bytes], repository: str, step: int, public: bool, say: Say = print) -> None:
    """Sends the files as one commit to a repository, which is made if it is missing: private, unless public.

    Raises:
      InputError: for a name or token that the Hub refuses.
      RunError: if it cannot be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(library_name="jaxrl", library_version=__version__)
    operations = [CommitOperationAdd(name, source) for name, source in files.items()]
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"jaxrl: the model after {step:,} steps")
    except (LocalTokenNotFoundError, HFValidationError) as error:
        raise InputError(f"--push {repository}: {first_line(error)}; hf auth login, or HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 500
        kind = InputError if 400 <= status < 500 and status not in (408, 429) else RunError
        remedy = "; is HF_TOKEN allowed to write there?" if status in (401, 403, 404) else ""
        raise kind(f"--push {repository}: the Hub answered {status}: {first_line(error)}{remedy}") from None
    except (HTTPError, OSError) as error:
        raise RunError(f"--push {repository}: the Hub cannot be reached ({first_line(error)})") from None
    say(f"{len(files)} files -> {url}")


def describe(files: dict[str, Path | bytes], repository: str, public: bool, say: Say = print) -> None:
    """Prints what `push` would send."""
    say(f"would send to {repository} ({'public' if public else 'private where it is new'}):")
    for name, source in files.items():
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        say(f"{size / 1e6:>12,.2f} MB  {name}")
    card = files["README.md"]
    assert isinstance(card, bytes)
    say(f"\n{card.decode()}")


def _on_hub(path: str) -> bool:
    """Whether a path of a recipe names something on the Hub, and not a folder here."""
    return is_hub_id(path) and not Path(path).exists()
