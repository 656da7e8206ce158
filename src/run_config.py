"""A trained fold's config.yaml: what it holds, and what must not differ between its folds or when it is continued."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import yaml

from .console import UserError

# Settings that may differ between a run and its continuation: where things are, and what executes them.
ELSEWHERE = {"data", "folds", "cache", "run", "fold", "metadata", "noise", "device", "workers", "threads", "restart", "soft_labels", "init",
             "checkpoint_seconds", "validate_every", "waveform_memory", "pictures", "cuda_graphs"}


def comparable(config: dict, *, between_folds: bool = False) -> dict:
    """What must be the same for a run to be continued, and for its folds to be evaluated together: each of them may have begun
    from its own fold of another run, whose recipe is the same."""
    init = config.get("init")
    if init and init["recipe_sha256"] and between_folds:
        init = {"recipe_sha256": init["recipe_sha256"]}
    settings = {key: value for key, value in config["settings"].items() if key not in ELSEWHERE}
    settings["noise"] = "some" if config["settings"].get("noise") else "none"  # its folder may have moved
    own = {} if between_folds else {"recordings": config.get("recordings", {})}  # another split or other labels are another training
    return {"settings": settings, "audio": config["audio"], "classes": " ".join(config["classes"]),
            "soft_labels_sha256": config.get("soft_labels_sha256"), "init": init, **own}


def read_config(folder: Path) -> dict:
    """A fold's config.yaml. Raises UserError where it is missing or damaged."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        comparable(config)
        return config
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.yaml: no fold was trained there; see python -m src.train") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.yaml'} is damaged: {error}") from error


def versions() -> dict[str, str]:
    """Of Python, the packages that numbers depend on, and the project's commit; "unknown" outside a repository, or without git."""
    try:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:
        commit = ""
    packages = ("torch", "numpy", "audiomentations", "albumentations")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "commit": commit or "unknown"}
