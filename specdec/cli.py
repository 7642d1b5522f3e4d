"""The command line: `specdec KEY=VALUE ...`, composed by Hydra. `specdec --help` says what there is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

VOLATILE = ("tracking", "run_dir", "sweep_dir")  # keys that may change between the parts of an interrupted run


def run(cfg: DictConfig, console: Console) -> float | None:
    """One run from a composed config; returns the pooled speed-up of its (first) drafter, if there is a baseline."""
    from specdec import composition, report
    from specdec.decoding import SpeculativeDecoder
    from specdec.experiment import Experiment, Job
    from specdec.tracking.run_folder import RunFolder

    choices = HydraConfig.get().runtime.choices
    composition.check_numbers(cfg)
    configs = composition.drafter_configs(cfg, choices.drafter)
    verifier = composition.build(cfg.verifier, "verifier")
    drafters = composition.build_methods(configs, verifier)
    sampling = composition.build_sampling(cfg)
    conversations = composition.build(cfg.dataset, "dataset").load()
    tracker = composition.build(cfg.tracking, "tracking")
    folder = Path(HydraConfig.get().runtime.output_dir)
    recorded = {"choices": _groups(choices), "config": {**_plain(cfg), "drafter": _plain(OmegaConf.create(configs))}}
    with RunFolder(folder, _without_volatile(recorded), sys.argv) as run_folder:
        if (folder / "DONE").exists():
            console.print(f"{folder} is done already; give another run_dir (or sweep_dir) to run it again")
            return _speedup(run_folder.finish(), list(configs))
        console.print(f"[dim]target {choices.target}: loading ...[/dim]")
        target = composition.build(cfg.target, "target")
        decoders = {
            name: SpeculativeDecoder(target, drafter, verifier, sampling, cfg.batch_size)
            for name, drafter in drafters.items()
        }
        job = Job(
            conversations, cfg.max_new_tokens, cfg.seed, cfg.passes, cfg.ignore_eos, choices.verifier, _side_by_side()
        )
        summary = Experiment(decoders, job, run_folder).run(console)
    report.print_summary(summary, console)
    where = tracker.log(folder)
    console.print(f"run folder: {folder}" + (f"   W&B: {where}" if where else ""))
    return _speedup(summary, list(configs))


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


def _side_by_side() -> bool:
    """Whether cells of a sweep run at the same time."""
    config = HydraConfig.get()
    return config.mode == RunMode.MULTIRUN and "n_jobs" in config.launcher and config.launcher.n_jobs != 1


def _speedup(summary: Any, names: list[str]) -> float | None:
    """Pooled speed-up of the first method that is not the baseline; None where it was not measured."""
    method = next((name for name in names if name != "none"), None)
    rows = summary[(summary["drafter"] == method) & (summary["task"] == "all")]
    return float(rows["speedup"].iloc[0]) if len(rows) and rows["speedup"].notna().all() else None


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    from specdec.tracking.run_folder import RunError

    console = Console(stderr=False)
    try:
        return run(cfg, console)
    except (ValueError, RunError) as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        folder = HydraConfig.get().runtime.output_dir
        _fail(f"interrupted; what was finished is kept. To go on: the same command with run_dir={folder}", 130)
    return None


def _fail(sentence: str, code: int) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]specdec:[/bold red] {sentence}", soft_wrap=True)
    sys.exit(code)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _hydra_main()


if __name__ == "__main__":
    main()
