"""``tbn-compiler export-c``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tbn_compiler.cli.models import add_inputs, add_model, example_inputs, load_model, self_test_inputs
from tbn_compiler.cli.options import Repeated, add_kernel_choice
from tbn_compiler.cli.output import add_json, print_json, stages
from tbn_compiler.errors import ConfigError
from tbn_compiler.tables import console


def parse_state(text: str) -> tuple[str, int]:
    """The name of an input and the index of an output, for ``type=`` of an option."""
    name, _, index = text.partition("=")
    if not name.isidentifier() or not index.isdecimal():
        raise argparse.ArgumentTypeError(f"must be the name of an input, = and the index of an output, got {text!r}")
    return name, int(index)


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    from tbn_compiler.backends.c import Package
    from tbn_compiler.backends.c.options import ScratchOwner

    parser = commands.add_parser("export-c", help="write a model as one standalone C99 file and a header")
    add_model(parser)
    add_inputs(parser, "fixes the sizes in the file, and is what its self-test runs")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("model.c"),
        help="C file, or folder of a package (default: %(default)s)",
    )
    parser.add_argument("--name", default="model", help="prefix of the C symbols (default: %(default)s)")
    parser.add_argument(
        "--scratch",
        choices=get_args(ScratchOwner),
        default="static",
        help="who owns the scratch memory (default: %(default)s)",
    )
    add_kernel_choice(parser)
    parser.add_argument(
        "--state",
        type=parse_state,
        action=Repeated,
        metavar="INPUT=OUTPUT",
        help="an input that the caller keeps from run to run, by name, and the index of the output that it becomes, "
        "with zeros at first; may be repeated",
    )
    for flag, text in (
        ("--skip-zeros", "run time may depend on the data"),
        ("--layer-hook", "call a macro of yours behind every step"),
        ("--int8-inputs", "take int8 in place of floats, with the scale of the layers that read them"),
        ("--int8-outputs", "give int8 in place of floats, where the model rounds its outputs"),
        ("--self-test", "add a test that runs the inputs and compares with what PyTorch gives"),
        ("--plan", "print steps, kernels, costs and memory"),
    ):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=text)
    parser.add_argument(
        "--self-test-inputs",
        type=Path,
        metavar="FILE",
        help="run the self-test on these instead: arrays as for --inputs, several inputs behind one another in each",
    )
    parser.add_argument("--package", choices=get_args(Package), help="write a folder for a build system")
    parser.add_argument("--package-version", default="1.0.0", help="of the package (default: %(default)s)")
    parser.add_argument(
        "--package-vendor", default="tbn_compiler", metavar="NAME", help="who answers for it (default: %(default)s)"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="picture of the scratch memory (needs matplotlib)")
    add_json(parser)
    parser.set_defaults(run=_run)


def _states(given: Sequence[tuple[str, int]]) -> dict[str, int]:
    """The pairs of ``--state``, each input once."""
    found = dict(given)
    if len(found) < len(given):
        raise ConfigError(f"--state names an input twice: {', '.join(f'{name}={index}' for name, index in given)}")
    return found


def _run(arguments: argparse.Namespace) -> None:
    from tbn_compiler.backends.c import export_c

    names = ["name", "scratch", "optimize", "target", "skip_zeros", "layer_hook", "self_test", "package"]
    names += ["int8_inputs", "int8_outputs", "package_version", "package_vendor"]
    options = {name: getattr(arguments, name) for name in names} | {"state": _states(arguments.state or ())}
    with stages(2) as begin:
        begin("model")
        model = load_model(arguments)
        inputs = example_inputs(arguments, model)
        if arguments.self_test_inputs is not None:
            options["self_test"] = self_test_inputs(arguments.self_test_inputs, model, inputs)
        begin("C file")
        plan = export_c(model, inputs, arguments.output, **options)
    if arguments.draw is not None:
        plan.draw(arguments.draw)
    if arguments.json:
        print_json({"output": arguments.output} | plan.to_dict())
        return
    if arguments.plan:
        console().print(plan.table())
    written = arguments.output if arguments.package else f"{arguments.output} and {arguments.output.with_suffix('.h')}"
    sizes = f"{plan.weight_bytes:,} bytes of constants, {plan.scratch_bytes:,} of scratch"
    sizes += f", {plan.state_bytes:,} of state" if plan.states else ""
    print(f"wrote {written}: {sizes}")
