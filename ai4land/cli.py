"""The command line: one verb a stage, ``run`` for all that is not done yet, ``demo`` for a planet of its own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import ai4land
from ai4land.errors import AI4LandError, ConfigError, DataError, Unfinished
from ai4land.run.config import RunConfig, plain_path
from ai4land.run.file import load_run

if TYPE_CHECKING:
    from ai4land.places import Place

app = typer.Typer(
    help="Annual high-resolution land cover from coarse land-use scenarios.\n\n"
    "A run file says what to map and from what; every command takes key=value to change it:\n\n"
    "    ai4land run pipelines/bavaria.yaml train.steps=500",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_TRY_AGAIN = 75
"""Exit status of work that was left and goes on when it is run again: EX_TEMPFAIL of sysexits.h."""
_console = Console(stderr=True, highlight=False)
_out = Console(highlight=False)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file, or the name of one that comes with the package.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, e.g. train.steps=200.")
]
SCORES = {
    "overall_accuracy": "overall accuracy",
    "macro_f1": "macro F1",
    "mean_iou": "mean IoU",
    "figure_of_merit": "Figure of Merit",
    "change_f1": "change F1",
    "quantity_disagreement": "quantity disagreement",
    "allocation_disagreement": "allocation disagreement",
    "coarse_error": "error against coarse totals",
}


def _folder(value: str) -> Path:
    """Read the folder of an option; a ``file://`` URL is one too."""
    path = plain_path(value)
    if "://" in path:
        raise ConfigError(f"folder is {value!r}, expected one on this machine; give its path")
    return Path(path)


def _tell(line: str) -> None:
    _console.print(line, markup=False, soft_wrap=True)


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on a terminal; a line now and then elsewhere."""
    if not _console.is_terminal:
        last = -1

        def line(done: int, total: int, note: str) -> None:
            nonlocal last
            tenth = 10 * done // max(total, 1)
            if tenth != last:
                last = tenth
                _tell(f"{label}: {done} of {total} {note}")

        yield line
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=_console, transient=True) as progress:
        task = progress.add_task(label, total=None, note="")
        yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)


@contextmanager
def _workers(run: RunConfig) -> Iterator[None]:
    """Inside an allocation each task of srun has its part: the block is done in one of them, and the others end here."""
    if run.cluster != "allocation":
        yield
        return
    from ai4land.workers.cluster import SETTINGS
    from ai4land.workers.srun import allocation

    with allocation(folder=run.folder, threads=run.reconstruct.hands, settings=SETTINGS, tell=_tell):
        yield


def _train(run: RunConfig) -> None:
    from ai4land.run import train

    with _bar("train") as bar:

        def step(number: int, row: dict[str, float]) -> None:
            bar(number, run.train.members * run.train.steps, f"loss {row['loss']:.4f}")

        train.train(run, tell=_tell, progress=step)


def _reconstruct(run: RunConfig) -> Place:
    from ai4land.run import reconstruct

    with _bar("reconstruct") as bar:
        return reconstruct.reconstruct(run, tell=_tell, progress=lambda done, total: bar(done, total, "blocks"))


def _evaluate(run: RunConfig) -> dict[str, Any]:
    from ai4land.run import evaluate

    scores = evaluate.evaluate(run, tell=_tell)
    for split in ("validation", "test"):
        if split in scores:
            _out.print(score_table(scores[split], title=f"{run.name}: {split} {_span(scores[split]['years'])}"))
    return scores


def _span(years: list[int]) -> str:
    return str(years[0]) if len(years) == 1 else f"{years[0]}-{years[-1]}"


def score_table(scores: dict[str, Any], *, title: str) -> Table:
    """Lay out the scores of one split: a row a score, a column a method."""
    methods = [name for name, part in scores.items() if isinstance(part, dict) and "overall_accuracy" in part]
    table = Table(title=title)
    table.add_column("score")
    for name in methods:
        table.add_column(name, justify="right")
    for key, label in SCORES.items():
        values = [scores[name].get(key) for name in methods]
        table.add_row(label, *("-" if v is None else f"{v:.4f}" for v in values))
    return table


@app.command()
def plan(
    run: RunFile,
    overrides: Overrides = None,
    calibrate: Annotated[bool, typer.Option(help="time this machine for a minute, to say how long the run takes")] = False,
    device: Annotated[str | None, typer.Option(help="say how long it takes on a device from its data sheet: h100, a100")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="workers, one to a device (default: those of the run file)")] = None,
    land: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of the shards with land, while there is no store")] = 1.0,
) -> None:
    """Say what a run will do, what is done and what it takes, without doing it; refuse what cannot fit.

    Example: ai4land plan pipelines/bavaria.yaml --calibrate
    """
    from ai4land.run import cost
    from ai4land.run.plan import plan as steps_of
    from ai4land.run.timing import calibrate as measure

    config = load_run(run, overrides or [])
    if calibrate and device:
        raise ConfigError("--calibrate and --device are both given, expected one; rates are either measured here or stated")
    rates = measure(config, tell=_tell) if calibrate else cost.rates_of(config, device) if device else None
    table = Table(title=f"plan of {run}", show_header=False)
    for name, value in steps_of(config, rates=rates, workers=workers, land=land, cuda=device is not None):
        table.add_row(name, value)
    _out.print(table)
    cost.refuse(config, workers=workers, land=land, device=device)


@app.command()
def align(run: RunFile, overrides: Overrides = None) -> None:
    """Bring maps, static layers and the scenario onto one grid, in one store.

    Example: ai4land align pipelines/bavaria.yaml
    """
    from ai4land.run.align import align as make

    config = load_run(run, overrides or [])
    with _workers(config):
        _out.print(str(make(config, tell=_tell)), soft_wrap=True)


@app.command()
def train(run: RunFile, overrides: Overrides = None) -> None:
    """Train the network; a training that was stopped goes on where it was.

    Example: ai4land train pipelines/bavaria.yaml train.steps=500
    """
    config = load_run(run, overrides or [])
    with _workers(config):
        _train(config)
    _out.print(str(config.folder / "model.safetensors"), soft_wrap=True)


@app.command()
def reconstruct(run: RunFile, overrides: Overrides = None) -> None:
    """Map every year into the cube; blocks that are done are not done again.

    Example: ai4land reconstruct pipelines/bavaria.yaml reconstruct.workers=2
    """
    config = load_run(run, overrides or [])
    with _workers(config):
        place = _reconstruct(config)
    _out.print(str(place), soft_wrap=True)


@app.command()
def evaluate(run: RunFile, overrides: Overrides = None) -> None:
    """Score the cube against held-out years and against simple baselines, and draw the figures.

    Example: ai4land evaluate pipelines/bavaria.yaml
    """
    _evaluate(load_run(run, overrides or []))


@app.command()
def publish(
    run: RunFile,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option(help="Folder of the catalogue (default: stac in that of the run).")] = None,
    base_url: Annotated[str, typer.Option(help="Address that the folder will have.")] = "",
    cog: Annotated[
        list[str] | None,
        typer.Option(metavar="YEARS", help="Year, or years such as 2000-2009, to export as GeoTIFF; may be repeated."),
    ] = None,
) -> None:
    """Describe the cube and the model as a STAC catalogue that can be served as it is.

    Example: ai4land publish pipelines/bavaria.yaml --cog 2015
    """
    from ai4land.run.publish import publish_run as write

    _out.print(str(write(load_run(run, overrides or []), to=to, base_url=base_url, cog=cog or [], tell=_tell)), soft_wrap=True)


@app.command(name="run")
def run_all(run: RunFile, overrides: Overrides = None) -> None:
    """Do every stage that is not done yet: align, train, reconstruct, evaluate.

    Example: ai4land run pipelines/bavaria.yaml train.steps=500 name=bavaria_short
    """
    config = load_run(run, overrides or [])
    with _workers(config):
        _whole(config)


def _whole(config: RunConfig) -> None:
    from ai4land.run.cost import refuse
    from ai4land.run.hold import hold

    refuse(config)
    with hold(config.folder):
        _train(config)
        place = _reconstruct(config)
        _evaluate(config)
    _out.print(f"Results are in {config.folder}: evaluation.json, figures/; the cube is {place}", soft_wrap=True)


@app.command()
def verify(
    cube: Annotated[str, typer.Argument(metavar="CUBE", help="Folder or URL of a cube, or of a part of one.")],
    run: Annotated[Path | None, typer.Option(help="Run file that made it; default: config.yaml beside the cube.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what is wrong, mend nothing.")] = False,
) -> None:
    """Read every shard of a cube again, compare it with the ledger, and make anew what is missing or damaged.

    Example: ai4land verify runs/bavaria/cube.zarr
    """
    from ai4land.cube.verify import verify
    from ai4land.run import reconstruct

    with _bar("verify") as bar:
        found = verify(cube, progress=lambda done, total: bar(done, total, "objects"))
    for damage in found:
        _tell(str(damage))
    if not found:
        _out.print(f"{cube} is as its ledger says", soft_wrap=True)
        return
    if check:
        raise DataError(f"{len(found)} things are wrong with cube {cube}; mend them with: ai4land verify {cube}")
    config = reconstruct.run_of(cube, run)
    with _workers(config), _bar("mend") as bar:
        reconstruct.mend(config, cube, found, tell=_tell, progress=lambda done, total: bar(done, total, "blocks"))
    _out.print(f"{cube} is mended and as its ledger says", soft_wrap=True)


@app.command()
def commit(
    cube: Annotated[str, typer.Argument(metavar="CUBE", help="Folder or s3:// URL of a cube, or of a part of one.")],
    to: Annotated[str | None, typer.Option(help="Folder or s3:// URL of the repository (default: beside the cube).")] = None,
) -> None:
    """Bring an Icechunk repository up to the years of a cube: a commit a year; the shards stay where they are.

    Example: ai4land commit runs/bavaria/cube.zarr
    """
    from ai4land.cube import versions

    with _bar("commits") as bar:
        versions.commit(cube, to=to, progress=bar)
    _out.print(str(to or versions.repository_path(cube)), soft_wrap=True)


@app.command()
def fetch(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Inputs, or with --catalog its collections.")],
    to: Annotated[Path, typer.Option(parser=_folder, help="Folder of the mirror.")] = Path("inputs"),
    years: Annotated[str | None, typer.Option(help="Years, e.g. 1992-1999.")] = None,
    bbox: Annotated[str | None, typer.Option(metavar="W,S,E,N", help="Box in degrees; W > E crosses the dateline.")] = None,
    catalog: Annotated[
        str | None, typer.Option(help="STAC catalogue or API to take them from (default: the inputs known here).")
    ] = None,
    asset: Annotated[list[str] | None, typer.Option(help="Asset of the items; can be given again (default: the data).")] = None,
    sign: Annotated[str, typer.Option(help="Who signs addresses: planetary_computer.")] = "",
    token: Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable with a bearer token.")] = None,
    token_host: Annotated[list[str] | None, typer.Option(help="Further host that the token is for; can be given again.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Files at once.")] = 4,
) -> None:
    """Bring inputs to a folder that needs no network, with a STAC catalogue; what is there and whole is not fetched again.

    Example: ai4land fetch hildaplus-uk koppen-geiger-0p1 --to inputs
    """
    from ai4land.sources.fetch import fetch_all
    from ai4land.sources.plan import signer

    options: dict[str, Any] = {"years": years, "bbox": bbox, "catalog": catalog, "assets": asset or [], "modifier": signer(sign)}
    with _bar("fetch") as bar:
        fetch_all(sources, to=to, token=token, token_hosts=token_host or [], threads=threads, tell=_tell, progress=bar, **options)
    _out.print(str(to / "catalog.json"), soft_wrap=True)


@app.command()
def serve(
    cube: Annotated[str, typer.Argument(metavar="CUBE", help="Folder of a cube, or its address (http, s3 ...).")],
    port: Annotated[int, typer.Option(help="where to listen; 0 takes a free port")] = 0,
    host: Annotated[str, typer.Option(help="who can reach it: 0.0.0.0 means everybody")] = "127.0.0.1",
    catalog: Annotated[
        Path | None, typer.Option(parser=_folder, help="folder of its STAC catalogue (default: stac beside the cube)")
    ] = None,
    cors: Annotated[bool, typer.Option("--cors", help="let web pages of other sites read it in a visitor's browser")] = False,
) -> None:
    """Show a cube in the browser: a map of every year, and its files and catalogue over HTTP.

    Example: ai4land serve runs/demo/cube.zarr
    """
    from ai4land.serve.server import serve as start

    start(cube, host=host, port=port, catalogue=catalog, cors=cors, tell=_tell)


@app.command()
def demo(
    overrides: Overrides = None,
    runs: Annotated[str, typer.Option(help="Folder for the results.")] = "runs",
) -> None:
    """Make a synthetic planet in the real formats and run the whole path on it, in a few minutes on two cores.

    Example: ai4land demo train.steps=200
    """
    from ai4land.synthetic.planet import make_planet

    config = load_run("demo.yaml", [f"runs={runs}", *(overrides or [])])
    planet = config.folder / "planet"
    _tell(f"planet: {planet}")
    make_planet(planet, seed=config.seed)
    _whole(config.model_copy(update={"data": str(planet)}))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what the package does.")] = False,
) -> None:
    # The level is the handler's too: Dask sets that of its own loggers to INFO.
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.basicConfig(level=handler.level, format="%(asctime)s %(name)s: %(message)s", handlers=[handler])
    if version:
        _out.print(ai4land.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; an error of the package is one readable text, not a traceback."""
    try:
        app()
    except Unfinished as left:
        _console.print(str(left), markup=False, soft_wrap=True)
        sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else _TRY_AGAIN)  # torchrun would start it again in the same job
    except AI4LandError as error:
        _console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
