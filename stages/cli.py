"""The command `edgewise`: check the params, read the results, choose a variant, and ship it.

Each subcommand is a module with `add_arguments(parser)` and `run(arguments)`. Only the module of the given subcommand
is imported, so that `edgewise --help` is quick. Paths are relative to the current folder: the top or `profiles/<name>`.
"""

import argparse
import importlib
import sys

from stages.common.errors import run_stage

COMMANDS = {
    "check": ("stages.params.check", "check params.yaml and print what `dvc repro` makes"),
    "choose": ("stages.reporting.choose", "choose the variant to deploy under limits on accuracy, latency and size"),
    "bundle": ("stages.edge.bundle", "write the folder that an edge device runs without PyTorch"),
    "printed": ("stages.edge.printed", "classify test images that are printed and filmed in simulation"),
    "results": ("stages.reporting.results", "print the summary of the results in this folder"),
}
"""The module and the help text of each subcommand."""


def command() -> None:
    about = "Make image classifiers small and fast for edge CPUs."
    parser = argparse.ArgumentParser(prog="edgewise", description=about)
    subparsers = parser.add_subparsers(metavar="<command>", required=True)
    given = next((argument for argument in sys.argv[1:] if argument in COMMANDS), None)
    for name, (path, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == given:
            module = importlib.import_module(path)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    arguments = vars(parser.parse_args())
    arguments.pop("run")(argparse.Namespace(**arguments))


def main() -> None:
    run_stage(command)
