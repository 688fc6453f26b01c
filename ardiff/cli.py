"""The ``ardiff`` command: one subcommand per job, configured by YAML files, options and ``key=value`` overrides."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from types import ModuleType

import yaml

from ardiff import logs
from ardiff.arguments import Call, command_parser, read_call
from ardiff.config import to_dict, to_yaml
from ardiff.data import s3
from ardiff.data.config import StorageConfig
from ardiff.errors import ArdiffError, ConfigError

logger = logging.getLogger(__name__)
COMMANDS = {
    "quickstart": ("ray_jobs.quickstart", "QuickstartConfig", "run everything, from videos to an evaluated model"),
    "prepare": ("ray_jobs.prepare", "PrepareConfig", "list and probe videos, or draw the synthetic set"),
    "train-vae": ("ray_jobs.train_vae", "TrainVAEConfig", "train the AR-VAE on clips"),
    "encode": ("ray_jobs.encode", "EncodeConfig", "encode clips to latents with a trained AR-VAE"),
    "train-dit": ("ray_jobs.train_dit", "TrainDiTConfig", "train the AR-DiT on latents"),
    "distill": ("ray_jobs.distill", "DistillConfig", "distill a pipeline into a student of few sampling steps"),
    "generate": ("ray_jobs.generate", "GenerateConfig", "generate videos with a trained pipeline"),
    "predict": ("ray_jobs.predict", "PredictConfig", "predict how real videos go on, beside baselines"),
    "sweep": ("ray_jobs.sweep", "SweepConfig", "generate a grid of videos, score every sweep point, and report"),
    "export": ("ardiff.train.export", "ExportConfig", "export a usable model from a training checkpoint"),
    "import-upstream": ("ardiff.import_upstream", "ImportConfig", "convert upstream checkpoints to a pipeline"),
    "evaluate": ("ray_jobs.evaluate", "EvaluateConfig", "score generated videos against real ones"),
    "evaluate-quick": ("ray_jobs.evaluate_quick", "QuickConfig", "score small synthetic videos, with controls"),
    "compare": ("ardiff.metrics.compare", "CompareConfig", "show scores of one protocol side by side"),
    "weights": (
        "ardiff.metrics.weights",
        "WeightsConfig",
        "list or fetch weights of feature networks and text encoders",
    ),
    "serve": ("ray_jobs.serve", "ServeConfig", "serve video generation over HTTP, with a web page"),
    "lint-serve": ("ray_jobs.serving.lint", "LintConfig", "check a Ray Serve configuration before deployment"),
    "api-key": ("ardiff.serving.keys", "ApiKeyConfig", "create an API key for the service"),
    "ablate": ("ray_jobs.ablate", "AblateConfig", "train variants of the quickstart and compare them"),
    "gpu-check": ("ardiff.gpu_check.command", "GpuCheckConfig", "check exactness, speed and memory of a device"),
    "estimate": ("ardiff.train.estimate.command", "EstimateConfig", "estimate memory, time and price of jobs"),
}
"""Commands with a configuration: module, configuration class and summary. The module has a function ``run(config)``."""
TOOLS = {
    "submit": ("ray_jobs.submit", "run a job on a remote cluster"),
    "client": ("ardiff.client", "request videos from a running service"),
    "doctor": ("ray_jobs.doctor", "check this machine or a cluster"),
}
"""Commands with options of their own and no configuration: module and summary."""
EXTRAS = {"ardiff.client": "serve", "ray_jobs.serve": "serve", "ray_jobs.serving.lint": "serve"}
"""The extra that brings the packages of a command's module, where it is not ``ray``."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0 for success, 1 for a failed job, 2 for a wrong call and 130 for an interruption."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    try:
        return _dispatch([a for a in arguments if a != "--debug"], debug)
    except KeyboardInterrupt:
        _print_error("Interrupted. The same command resumes (without resume=none).", "\n")
        return 130
    except ArdiffError as error:
        if debug:
            traceback.print_exc()
        _print_error(str(error), "ardiff: ")
        return 2 if isinstance(error, ConfigError) else 1


def _print_error(message: str, prefix: str) -> None:
    """Logs the error as JSON, or prints it to standard error."""
    if logs.is_set_up():
        logger.error("%s", message)
    else:
        print(f"{prefix}{message}", file=sys.stderr)


def _dispatch(arguments: list[str], debug: bool) -> int:
    if debug:
        os.environ["ARDIFF_DEBUG"] = "1"
    command = arguments[0] if arguments else ""
    if arguments == ["doctor"]:
        from ardiff.doctor import examine

        return examine()
    if command in TOOLS:
        code: int = _load(TOOLS[command][0]).main(arguments[1:])
        return code
    if command not in COMMANDS:
        _top_parser().parse_args(arguments)
        return 2
    call = read_arguments(command, arguments[1:])
    if call.dry_run:
        print(to_yaml(call.config), end="")
        if call.storage != StorageConfig():
            print(yaml.safe_dump({"storage": to_dict(call.storage)}, sort_keys=False), end="")
        if hasattr(call.module, "describe_plan"):
            s3.configure(call.storage)
            print(textwrap.indent(call.module.describe_plan(call.config), "# "))
        return 0
    if call.log:
        os.environ[logs.FORMAT] = call.log
    logs.start_run(command, to_dict(call.config).get("output"))
    s3.configure(call.storage)
    call.module.run(call.config)
    return 0


def read_arguments(command: str, arguments: Sequence[str]) -> Call:
    """Reads the arguments of one of the ``COMMANDS``. Raises ConfigError; exits with 2 for an unknown option."""
    module_name, class_name, summary = COMMANDS[command]
    module = _load(module_name)
    config_class = getattr(module, class_name)
    return read_call(command, module, config_class, command_parser(command, summary, module, config_class), arguments)


def _load(name: str) -> ModuleType:
    """Imports the module of a command. Raises ArdiffError naming the extra to install if a package is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("ardiff", "ray_jobs"):
            raise
        extra = EXTRAS.get(name, "ray")
        message = f"This command needs the package {package}, which is not installed: pip install 'ardiff[{extra}]'."
        raise ArdiffError(message) from error


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ardiff",
        description="AR-Diffusion: train, sample and evaluate asynchronous autoregressive video diffusion on Ray.",
        epilog="`ardiff COMMAND --help` lists the settings of a command. --debug shows tracebacks.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (*_, summary) in (COMMANDS | TOOLS).items():
        commands.add_parser(command, help=summary, add_help=False)
    return parser
