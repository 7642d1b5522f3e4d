"""The command line: `specdec KEY=VALUE ...`, composed by Hydra. `specdec --help` says what there is."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from specdec import __version__
from specdec.sweep import end_sweep

if TYPE_CHECKING:
    from specdec.decoding import SpeculativeDecoder
    from specdec.target.ranks import Ranks

VOLATILE = ("tracking", "run_dir", "sweep_dir")  # keys that may change between the parts of an interrupted run
LONGEST_NAME = 120  # characters of a cell's folder; file systems take 255 bytes


class CellError(RuntimeError):
    """A cell of a sweep failed and has said why; the other cells run on."""


def cell_name(overrides: str) -> str:
    """Folder of a sweep's cell: the same for the same overrides, one level deep, and short enough for a file system."""
    name = overrides.replace("/", "_") or "default"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"


OmegaConf.register_new_resolver("cell_name", cell_name, replace=True)


def run(cfg: DictConfig, console: Console) -> float | None:
    """One run from a composed config; returns the pooled speed-up of its (first) drafter, if there is a baseline."""
    from specdec import composition, metrics, report
    from specdec.experiment import Experiment, Job, follow
    from specdec.target import ranks
    from specdec.tracking.run_folder import RunFolder

    choices, folder = HydraConfig.get().runtime.choices, output_folder()
    if _side_by_side() and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "cells side by side cannot each share a model among processes: leave hydra/launcher=joblib out"
        )
    composition.check_values(cfg)
    configs = composition.drafter_configs(cfg, choices.drafter, HydraConfig.get().overrides.task)
    verifier = composition.build(cfg.verifier, "verifier")
    drafters = composition.build_methods(configs, verifier)
    sampling = composition.build_sampling(cfg)
    group = ranks.joined()
    if group is not None and group.rank > 0:
        if ranks.share(False):
            follow(_decoders(cfg, drafters, verifier, sampling))
        return None
    conversations = composition.build(cfg.dataset, "dataset").load()
    tracker = composition.build(cfg.tracking, "tracking")
    recorded = {"choices": _groups(choices), "config": {**_plain(cfg), "drafter": _plain(OmegaConf.create(configs))}}
    with RunFolder(folder, _without_volatile(recorded), sys.argv) as run_folder:
        ranks.share(not run_folder.done)
        if run_folder.done:
            _note(console, f"{folder} is done already; give another run_dir (or sweep_dir) to run it again")
            return _speedup(metrics.summary(metrics.load_trace(folder)), list(configs))
        console.print(f"target {choices.target}: loading ... (the first time compiles kernels)", style="dim")
        decoders = _decoders(cfg, drafters, verifier, sampling)
        job = Job(
            conversations, cfg.max_new_tokens, cfg.seed, cfg.passes, cfg.ignore_eos, choices.verifier, _side_by_side()
        )
        summary = Experiment(decoders, job, run_folder).run(console)
    report.print_summary(summary, console)
    _note(console, f"run folder: {folder}")
    if where := tracker.log(folder, _sweep_name()):
        _note(console, f"W&B: {where}")
    return _speedup(summary, list(configs))


def _decoders(cfg: DictConfig, drafters: dict[str, Any], verifier: Any, sampling: Any) -> dict[str, SpeculativeDecoder]:
    """One target, and a decoder for every drafter; the baseline's is plain decoding, whatever verifier judges the others.

    ValueError for ranks that would each run a model of their own.
    """
    from specdec import composition
    from specdec.decoding import SpeculativeDecoder, self_test

    target, group = composition.build(cfg.target, "target"), _ranks()
    if group is not None and getattr(target, "ranks", None) is None:
        raise ValueError(
            f"{group.world} processes were started, and {type(target).__name__} with these options is not shared "
            "among processes: start one, or use target=llama without target.shard"
        )
    exact = composition.exact_verifier()  # without drafts a lossy rule may still choose tokens its own way
    decoders = {
        name: SpeculativeDecoder(
            target, drafter, exact if name == composition.BASELINE else verifier, sampling, cfg.batch_size,
            logprobs=cfg.logprobs,
        )
        for name, drafter in drafters.items()
    }  # fmt: skip
    for decoder in decoders.values():
        self_test(decoder)
    return decoders


def output_folder() -> Path:
    """This run's folder, relative to where the command was given if it lies there."""
    folder, here = Path(HydraConfig.get().runtime.output_dir), Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _in_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _sweep_name() -> str | None:
    """Name of the sweep that this run is a cell of; W&B groups by it."""
    return Path(HydraConfig.get().sweep.dir).name if _in_sweep() else None


def _side_by_side() -> bool:
    """Whether cells of a sweep run at the same time."""
    launcher = HydraConfig.get().launcher
    return _in_sweep() and "n_jobs" in launcher and launcher.n_jobs != 1


def _groups(choices: DictConfig) -> dict[str, Any]:
    """Names chosen for our own config groups."""
    return {str(k): v for k, v in choices.items() if not str(k).startswith("hydra") and v is not None}


def _plain(cfg: Any) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _without_volatile(recorded: dict[str, Any]) -> dict[str, Any]:
    recorded["config"] = {key: value for key, value in recorded["config"].items() if key not in VOLATILE}
    recorded["choices"].pop("tracking", None)
    return recorded


def _speedup(summary: Any, names: list[str]) -> float | None:
    """Pooled speed-up of the first method that is not the baseline; None where it was not measured."""
    method = next((name for name in names if name != "none"), None)
    rows = summary[(summary["drafter"] == method) & (summary["task"] == "all")]
    return float(rows["speedup"].iloc[0]) if len(rows) and rows["speedup"].notna().all() else None


@hydra.main(version_base="1.3", config_path="conf", config_name="config")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> float | None:
    from specdec.composition import check_keys, one_sentence
    from specdec.target.ranks import RankError
    from specdec.tracking.run_folder import RunError

    warnings.showwarning = _show_warning  # here, because a sweep's cells may run in processes of their own
    try:
        check_keys(cfg, HydraConfig.get().job.config_name)
        if "training" in cfg:
            from specdec.train.cli import run as train

            return train(cfg, Console(), output_folder(), VOLATILE)
        return run(cfg, Console())
    except (ValueError, OSError, RunError, RankError, OmegaConfBaseException) as error:
        if output_folder() != Path() and output_folder().is_dir() and not any(output_folder().iterdir()):
            output_folder().rmdir()
        if _in_sweep() and _ranks() is None:  # the others of several ranks would not know which cell comes next
            _say(f"{output_folder().name}: {one_sentence(error)}")
            remedy = "once that is put right, the same command runs what is left"
            raise CellError(f"a cell of the sweep failed, see above; {remedy}") from error
        _say(one_sentence(error))
        sys.exit(2)
    except KeyboardInterrupt:
        same = "the same command" if _in_sweep() else f"the same command with run_dir={output_folder()}"
        _say(f"interrupted; what was finished is kept. To go on: {same}")
        sys.exit(130)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as sentences; those of other packages as Python shows them, without the source line."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    sys.stderr.write(f"specdec: {message}\n" if ours else f"{filename}: {category.__name__}: {message}\n")


def _note(console: Console, line: str, style: str = "") -> None:
    """A line as it is: brackets in a folder's name are no markup, and a path stays whole for copying."""
    console.print(Text(line, style=style), soft_wrap=True)


def _say(sentence: str) -> None:
    """One sentence to the user, in red and on stderr; of several ranks that fail together one says it."""
    ranks = _ranks()
    if ranks is not None and not ranks.speaks():
        return
    name, place = "specdec:", sys.stderr
    if ranks is not None and ranks.rank > 0:
        name, place = f"specdec, rank {ranks.rank}:", sys.__stderr__ or sys.stderr
    Console(file=place).print(Text.assemble((name, "bold red"), " ", sentence), soft_wrap=True)


def _ranks() -> Ranks | None:
    """The processes that share the model, once `main` has joined them; torch is imported for them alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    from specdec.target.ranks import joined

    return joined()


def main() -> None:
    """Entry point of the console script, also under torchrun. Exit status: 0 done, 2 a mistake, 130 interrupted."""
    if "--version" in sys.argv[1:]:
        import torch

        print(f"specdec {__version__}, torch {torch.__version__}, Hydra {hydra.__version__}")
        return
    sys.argv[1:2] = ["--config-name=train" if word == "train" else word for word in sys.argv[1:2]]
    if os.environ.get("WORLD_SIZE", "1") == "1":
        _main()
        return
    from specdec.target import ranks

    try:
        group = ranks.join()
    except (ValueError, ranks.RankError) as error:
        _say(str(error))
        sys.exit(2)
    if group is None or group.rank == 0:
        _main()
    else:
        _main_silently()
    ranks.leave()


def _main_silently() -> None:
    """Without a word, and with Hydra's folders out of the way, among the overrides, which must stand together."""
    at = next((i for i, a in enumerate(sys.argv) if i and "=" in a and not a.startswith("-")), len(sys.argv))
    with tempfile.TemporaryDirectory() as unused, open(os.devnull, "w") as nowhere:
        sys.argv[at:at] = [f"hydra.run.dir={unused}", f"hydra.sweep.dir={unused}"]
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            _main()


def _main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands its errors on instead of printing them its own way
    try:
        _hydra_main()
        end_sweep(Console())
    except (HydraException, OmegaConfBaseException, OSError) as error:
        from specdec.composition import one_sentence

        _say(one_sentence(error))
        sys.exit(2)
    except CellError as error:
        end_sweep(Console())
        _say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted; the same command begins again, and what a sweep had finished is kept")
        sys.exit(130)


if __name__ == "__main__":
    main()
