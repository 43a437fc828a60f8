"""Packages, self-tests and hooks: what is around the model."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import ExportError
from tbn_compiler.backends.c import Package, export_c, host
from tbn_compiler.backends.c.package import PACKAGES, Vectors
from tests.backends.c.toolchain import WARNINGS, needs_cc, needs_cxx, sanitizer_flags


class TwoWays(nn.Module):
    """Two inputs, a float and an integer output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor, register: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x) * register
        return y, y.argmax(1)


def two_ways() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return tbn.transform(TwoWays(), tbn.TilingConfig(p=2, min_size=0)), (torch.randn(2, 8), torch.rand(2, 3))


def compile_and_run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [*shlex.split(host.find_compiler() or "cc"), "-std=c99", *WARNINGS, *sanitizer_flags()]
    built = subprocess.run(
        [*command, *map(str, arguments), "-lm", "-o", folder / "run"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return subprocess.run([folder / "run"], capture_output=True, text=True)


@needs_cc
@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_the_self_test_finds_a_changed_weight(scratch: Any, tmp_path: Path) -> None:
    module, inputs = two_ways()
    export_c(module, inputs, tmp_path / "net.c", name="net", scratch=scratch, self_test=True)
    (tmp_path / "main.c").write_text('#include "net.h"\nint main(void) { return net_self_test(); }\n')
    assert compile_and_run(tmp_path / "main.c", tmp_path / "net.c", folder=tmp_path).returncode == 0
    text = (tmp_path / "net.c").read_text()
    # `register` is a keyword in C: the parameter has another name.
    assert "const float *x, const float *register_2" in text
    assert "const float *register," not in text
    broken = re.sub(r"(_weight_alpha\[1\] = {\n    )", r"\g<1>9.0f *", text)
    assert broken != text
    (tmp_path / "net.c").write_text(broken)
    assert compile_and_run(tmp_path / "main.c", tmp_path / "net.c", folder=tmp_path).returncode == 1


@needs_cc
@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_a_self_test_compares_each_of_several_inputs(scratch: Any, tmp_path: Path) -> None:
    module, inputs = two_ways()
    others = [(torch.randn(2, 8), torch.rand(2, 3)) for _ in range(3)]
    export_c(module, inputs, tmp_path / "net.c", name="net", scratch=scratch, self_test=others)
    header, text = (tmp_path / "net.h").read_text(), (tmp_path / "net.c").read_text()
    # 16 + 6 floats in, 6 floats and 2 integers out.
    assert "Run the model on 3 stored inputs" in header
    assert f"take {3 * 30 * 4} bytes" in header
    assert "net_test_x[3][NET_X_SIZE]" in text
    main = tmp_path / "main.c"
    main.write_text(
        '#include <stdio.h>\n#include "net.h"\nint main(void) { printf("%d", net_self_test()); return 0; }\n'
    )
    assert compile_and_run(main, tmp_path / "net.c", folder=tmp_path).stdout == "0"
    # What PyTorch gave for the last input in both outputs, changed one after the other: outputs 5 and 6 of all.
    for array, changed in (("out0", "9.5f, "), ("out1", "7, ")):
        start = text.index(f"net_test_{array}[3]")
        place = text.index("        ", text.rindex("    {\n", start, text.index("};", start))) + len(" " * 8)
        broken = text[:place] + changed + re.sub(r"^[^,]*, ", "", text[place:], count=1)
        (tmp_path / "net.c").write_text(broken)
        expected = {"out0": "5", "out1": "6"}[array]
        assert compile_and_run(main, tmp_path / "net.c", folder=tmp_path).stdout == expected


def test_each_input_of_a_self_test_has_its_own_tolerance() -> None:
    outputs = np.array([[1, -2], [1000, 3]], np.float32)
    vectors = Vectors((outputs,), (outputs, outputs.astype(np.int32)), (0.5, 0.0))
    assert np.allclose(vectors.tolerances[0], (0.2 + 2e-4, 0.5 + 1e-1))  # a tenth of the largest at most
    assert vectors.tolerances[1] == (0, 0)
    assert vectors.nbytes == 3 * 16


@pytest.mark.parametrize(
    ("self_test", "message"),
    [
        (torch.zeros(3, 4), "True or a list of inputs, such as list(x.split(1)), not Tensor"),
        ([], "not list without any"),
        (3, "not int"),
        (
            [torch.zeros(1, 4), torch.zeros(1, 5)],
            "self_test[1] is float32 [1, 5]; the example inputs are float32 [1, 4]",
        ),
        ([torch.zeros(1, 4, dtype=torch.int64)], "self_test[0] is int64 [1, 4]; the example inputs are float32"),
        ([(torch.zeros(1, 4),) * 2], "self_test[0] is float32 [1, 4], float32 [1, 4]; the example inputs are"),
        ([[np.zeros((1, 4), np.float32)]], "self_test[0] is no tensor but ndarray; the example inputs are float32"),
        ([None], "self_test[0] is no tensor but NoneType; the example inputs are float32"),
        ([torch.ones(1, 4), torch.full((1, 4), torch.inf)], "output 0 of self_test[1] is not finite"),
    ],
)
def test_inputs_that_a_self_test_cannot_take(self_test: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / "net.c", self_test=self_test)
    assert list(tmp_path.iterdir()) == []


@needs_cc
def test_infinite_inputs_of_a_self_test_compile(tmp_path: Path) -> None:
    export_c(nn.ReLU6(), torch.tensor([[1.0, torch.inf, -torch.inf]]), tmp_path / "net.c", name="net", self_test=True)
    main = tmp_path / "main.c"
    main.write_text('#include "net.h"\nint main(void)\n{\n    return net_self_test();\n}\n')
    assert compile_and_run(main, tmp_path / "net.c", folder=tmp_path).returncode == 0


def test_numbers_that_c_cannot_hold_are_no_test(tmp_path: Path) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0, 5)

    with pytest.raises(ExportError, match="input of a self-test has numbers that int32 cannot hold"):
        export_c(Same(), torch.tensor([1, 2**33]), tmp_path / "net.c", self_test=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "m", "package": "cmake"}, "name='m' means something else to CMake"),
        ({"name": "test", "package": "cmake"}, "name='test' means something else to CMake"),
        ({"package": "cmsis-pack", "package_vendor": "a--b"}, "with single - between them"),
        ({"package": "cmsis-pack", "package_vendor": []}, "package_vendor"),
        ({"package": "cmake", "package_version": "1\u0661.0.0"}, "is not of the form 1.2.3"),
    ],
)
def test_names_that_packages_cannot_have(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / "net", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_self_test_needs_finite_outputs(tmp_path: Path) -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    with pytest.raises(ExportError, match="output 0 of the example inputs is not finite"):
        export_c(Log(), torch.zeros(1, 4), tmp_path / "net.c", self_test=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@needs_cc
def test_the_cmake_project_builds_and_tests_itself(tmp_path: Path) -> None:
    module, inputs = two_ways()
    export_c(module, inputs, tmp_path / "net", name="net", package="cmake")
    for command in (
        ["cmake", "-S", "net", "-B", "build", f"-DCMAKE_C_FLAGS={' '.join(WARNINGS)}"],
        ["cmake", "--build", "build"],
        ["ctest", "--test-dir", "build", "--output-on-failure"],
    ):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "100% tests passed" in result.stdout
    # As a part of another project it brings its source and header, and no test.
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(user C)\nadd_subdirectory(net)\n"
        "add_executable(user user.c)\ntarget_link_libraries(user PRIVATE net)\n"
    )
    (tmp_path / "user.c").write_text('#include "net.h"\nint main(void) { return net_self_test(); }\n')
    for command in (["cmake", "-S", ".", "-B", "outer"], ["cmake", "--build", "outer"], ["outer/user"]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert not list((tmp_path / "outer").rglob("*self_test*"))


# What the example needs of Arduino's own header, on this computer.
_ARDUINO = """
#include <stdio.h>
static inline unsigned long micros(void) { return 0; }
static inline unsigned long millis(void) { return 0; }
static void delay(unsigned long milliseconds) { (void)milliseconds; }
static struct {
    void begin(long baud) { (void)baud; }
    void print(const char *text) { printf("%s", text); }
    void print(double value, int digits) { printf("%.*f", digits, value); }
    void print(int value) { printf("%d", value); }
    void println(unsigned long value) { printf("%lu\\n", value); }
    void println(double value, int digits) { printf("%.*f\\n", digits, value); }
    void println(int value) { printf("%d\\n", value); }
} Serial;
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_the_arduino_example_prints_what_pytorch_gives(scratch: Any, tmp_path: Path) -> None:
    """The IDE compiles the example as C++ and the library's C file as C."""
    module, inputs = two_ways()
    export_c(module, inputs, tmp_path / "net", name="net", package="arduino", scratch=scratch)
    folder = tmp_path / "net"
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    examples = ["examples/net/net.ino", "examples/net_self_test/net_self_test.ino"]
    assert written == [*examples, "library.properties", "src/net.c", "src/net.h"]
    properties = dict(line.split("=", 1) for line in (folder / "library.properties").read_text().splitlines())
    required = {"name", "version", "author", "maintainer", "sentence", "paragraph", "category", "url", "architectures"}
    assert required <= set(properties)
    assert "esp32" in properties["architectures"].split(",")
    assert not {"*", "avr", "megaavr", "esp8266"} & set(properties["architectures"].split(","))  # constants in RAM
    assert properties["category"] == "Data Processing"  # the IDE knows only certain ones
    example = (folder / "examples" / "net" / "net.ino").read_text()
    test = (folder / "examples" / "net_self_test" / "net_self_test.ino").read_text()
    compiler = shlex.split(host.find_compiler() or "cc")
    commands = [[*compiler, "-std=c99", *WARNINGS, "-c", folder / "src" / "net.c", "-o", tmp_path / "net.o"]]
    for name, sketch in (("example", example), ("test", test)):
        (tmp_path / f"{name}.cpp").write_text(_ARDUINO + sketch + "int main() { setup(); loop(); return 0; }\n")
        sources = [tmp_path / f"{name}.cpp", tmp_path / "net.o"]
        commands.append(["g++", "-std=c++11", f"-I{folder / 'src'}", *sources, "-o", tmp_path / name])
    for command in commands:
        built = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
    printed, tested = (
        subprocess.run([tmp_path / name], capture_output=True, text=True).stdout for name in ("example", "test")
    )
    assert tested == "net: self-test passed, milliseconds: 0\n"
    pairs = [tuple(map(float, line.split(": ")[1].split(", "))) for line in printed.splitlines() if "expected" in line]
    expected = [*module.eval()(*inputs)[0].flatten().tolist(), *module(*inputs)[1].tolist()]
    assert [pair[1] for pair in pairs] == pytest.approx(expected, abs=1e-5)
    assert [pair[0] for pair in pairs] == pytest.approx(expected, abs=1e-5)


class Running(nn.Module):
    """A mean over time of a layer's results, which begins at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        mean = 0.5 * mean + 0.5 * self.net(x).relu()
        return mean.argmax(1), mean


@needs_cxx
@needs_cc
def test_packages_of_a_model_with_a_state(tmp_path: Path) -> None:
    model, x, ones = Running(), torch.randn(1, 8), torch.ones(1, 3)
    options: dict[str, Any] = {"name": "net", "state": {"mean": 1}, "initial_state": {"mean": ones}}
    export_c(model, (x, ones), tmp_path / "cmake", package="cmake", **options)
    folder = tmp_path / "cmake"
    arguments = (f"-I{folder / 'include'}", folder / "test" / "main.c", folder / "src" / "net.c")
    assert compile_and_run(*arguments, folder=tmp_path).returncode == 0
    text = (folder / "src" / "net.c").read_text()
    assert text.count("net_init(&state);") == 1
    export_c(model, (x, ones), tmp_path / "net", package="arduino", **options)
    example = (tmp_path / "net" / "examples" / "net" / "net.ino").read_text()
    (tmp_path / "main.cpp").write_text(_ARDUINO + example + "int main() { setup(); loop(); loop(); return 0; }\n")
    source = tmp_path / "net" / "src"
    command = ["g++", "-std=c++11", "-fpermissive", "-w", f"-I{source}", tmp_path / "main.cpp", source / "net.c"]
    built = subprocess.run([*map(str, command), "-o", tmp_path / "run"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([tmp_path / "run"], capture_output=True, text=True).stdout
    first = model(x, ones)[0].item()
    assert re.findall(r"expected: (\d), (\d)", printed) == [(str(first), str(first))] * 2


@needs_cc
def test_a_self_test_of_several_steps_keeps_the_state(tmp_path: Path) -> None:
    """Inputs of a list follow one another from the initial state on; the first output that differs is named."""
    model, ones = Running(), torch.ones(1, 3)
    steps = [(torch.randn(1, 8), torch.randn(1, 3)) for _ in range(4)]
    path, options = tmp_path / "net.c", {"name": "net", "state": {"mean": 0}, "initial_state": {"mean": ones}}
    export_c(Reversed(model), steps[0], path, self_test=steps, **options)
    main = tmp_path / "main.c"
    main.write_text('#include "net.h"\nint main(void)\n{\n    return net_self_test();\n}\n')
    assert compile_and_run(main, path, folder=tmp_path).returncode == 0
    mean, expected = ones, []
    for x, _ in steps:
        mean = 0.5 * mean + 0.5 * model.net(x).relu()
        expected.append(mean.sum().item())
    text = path.read_text()
    for number, value in enumerate(expected):
        printed = re.search(
            rf"net_test_output\[4\]\[.*?\] = {{\n(?:    {{\n.*\n    }},\n){{{number}}}    {{\n +(\S+)\n", text
        )
        assert printed is not None
        assert float(printed[1].rstrip("f")) == pytest.approx(value, rel=1e-5)
        spoiled = text[: printed.start(1)] + "99.0f" + text[printed.end(1) :]
        path.write_text(spoiled)
        assert compile_and_run(main, path, folder=tmp_path).returncode == number + 1
        path.write_text(text)


class Reversed(nn.Module):
    """The sum of the mean behind the state."""

    def __init__(self, model: Running) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.model(x, mean)[1]
        return mean, mean.sum(1)


def test_a_cmsis_pack_lists_its_files(tmp_path: Path) -> None:
    """What version 1.7.7 of the schema asks of the elements that are there, and that the files are."""
    module, inputs = two_ways()
    options: dict[str, Any] = {"package": "cmsis-pack", "package_version": "2.0.1", "package_vendor": "Example-Works"}
    export_c(module, inputs, tmp_path / "net", name="net", **options)
    written = {
        path.relative_to(tmp_path / "net").as_posix() for path in (tmp_path / "net").rglob("*") if path.is_file()
    }
    assert "Example-Works.net.pdsc" in written  # the tools look for this name
    pack = ElementTree.parse(tmp_path / "net" / "Example-Works.net.pdsc").getroot()
    assert (pack.tag, pack.attrib["schemaVersion"]) == ("package", "1.7.7")
    required, optional = {"name", "vendor", "description", "url", "releases"}, {"components", "taxonomy"}
    tags = [element.tag for element in pack]
    assert required <= set(tags) <= required | optional
    assert len(tags) == len(set(tags))
    assert (pack.findtext("vendor"), pack.findtext("name")) == ("Example-Works", "net")
    (release,) = pack.iterfind("releases/release")
    (component,) = pack.iterfind("components/component")
    assert release.attrib["version"] == component.attrib["Cversion"] == "2.0.1"
    assert {"Cclass", "Cgroup", "Csub", "Cversion"} == set(component.attrib)
    described = pack.find("taxonomy/description")
    assert described is not None
    assert all(described.attrib[key] == component.attrib[key] for key in ("Cclass", "Cgroup"))
    assert [element.tag for element in component] == ["description", "files"]
    files = {element.attrib["name"]: element.attrib for element in component.iterfind("files/file")}
    assert {name for name, found in files.items() if found["category"] != "include"} | {
        "Example-Works.net.pdsc"
    } == written
    assert files["include/"]["category"] == "include"
    assert {found["category"] for found in files.values()} == {"include", "header", "sourceC"}
    assert files["template/net_self_test.c"]["attr"] == "template"
    with pytest.raises(ExportError, match="the name of a CMSIS component has at most 32 letters"):
        export_c(module, inputs, tmp_path / "other", name="n" * 33, package="cmsis-pack")


@needs_cc
def test_the_self_test_of_a_pack_is_a_program(tmp_path: Path) -> None:
    module, inputs = two_ways()
    export_c(module, inputs, tmp_path / "net", name="net", package="cmsis-pack")
    sources = (tmp_path / "net" / "template" / "net_self_test.c", tmp_path / "net" / "src" / "net.c")
    assert compile_and_run(f"-I{tmp_path / 'net' / 'include'}", *sources, folder=tmp_path).returncode == 0


# What a module needs of Zephyr, on this computer: functions of its build, and two headers.
_ZEPHYR_CMAKE = """
cmake_minimum_required(VERSION 3.20)
project(zephyr C)
add_executable(firmware main.c)
macro(zephyr_library_named name)
    set(library ${name})
    add_library(${name} OBJECT)
    target_link_libraries(firmware PRIVATE ${name} m)
endmacro()
macro(zephyr_library_sources)
    target_sources(${library} PRIVATE ${ARGN})
endmacro()
macro(zephyr_library_sources_ifdef option)
    if(${option})
        target_sources(${library} PRIVATE ${ARGN})
    endif()
endmacro()
function(zephyr_include_directories)
    foreach(folder ${ARGN})
        get_filename_component(folder ${folder} ABSOLUTE)
        target_include_directories(${library} PRIVATE ${folder} ${CMAKE_SOURCE_DIR}/stubs)
        target_include_directories(firmware PRIVATE ${folder})
    endforeach()
endfunction()
add_subdirectory(${MODULE} module)
"""
_ZEPHYR_HEADERS = {
    "init.h": "#define CONFIG_KERNEL_INIT_PRIORITY_DEFAULT 40\n"
    "#define SYS_INIT(function, level, priority) \\\n"
    "    __attribute__((constructor)) static void at_start(void) { (void)function(); } \\\n"
    "    struct level##_##priority\n",
    "sys/printk.h": "#include <stdio.h>\n#define printk printf\n",
}


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@needs_cc
def test_a_zephyr_module_builds_and_tests_itself_at_the_start(tmp_path: Path) -> None:
    module, inputs = two_ways()
    export_c(module, inputs, tmp_path / "net", name="net", package="zephyr")
    described = (tmp_path / "net" / "zephyr" / "module.yml").read_text().splitlines()
    assert described[1:] == ['name: "net"', "build:", "  cmake: .", "  kconfig: zephyr/Kconfig"]
    options = re.findall(r"^config (\w+)$", (tmp_path / "net" / "zephyr" / "Kconfig").read_text(), re.MULTILINE)
    assert options == ["TBN_NET", "TBN_NET_SELF_TEST"]
    (tmp_path / "CMakeLists.txt").write_text(_ZEPHYR_CMAKE)
    (tmp_path / "main.c").write_text(
        '#include "net.h"\nint main(void) {\n'
        "    static float x[NET_X_SIZE], r[NET_REGISTER_2_SIZE], y[NET_OUT0_SIZE];\n"
        "    static int32_t best[NET_OUT1_SIZE];\n    net_run(x, r, y, best);\n    return 0;\n}\n"
    )
    for name, text in _ZEPHYR_HEADERS.items():
        path = tmp_path / "stubs" / "zephyr" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    settings = ["-DCONFIG_TBN_NET=y", "-DCONFIG_TBN_NET_SELF_TEST=y", f"-DMODULE={tmp_path / 'net'}"]
    settings += [f"-DCMAKE_C_FLAGS={' '.join(WARNINGS)} -std=c99"]
    for command in (["cmake", "-S", ".", "-B", "build", *settings], ["cmake", "--build", "build"]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    printed = subprocess.run([tmp_path / "build" / "firmware"], capture_output=True, text=True, check=True)
    assert printed.stdout == "net: self-test passed\n"


def test_a_zephyr_module_asks_for_what_the_model_needs(tmp_path: Path) -> None:
    for layer, target, wanted in (
        (nn.Sigmoid(), "generic", {"select REQUIRES_FULL_LIBC", "imply FPU"}),
        (nn.ReLU(), "cortex-m0plus", set()),
    ):
        export_c(layer, torch.ones(1, 4), tmp_path / "net", package="zephyr", target=target)  # type: ignore[arg-type]
        lines = {line.strip() for line in (tmp_path / "net" / "zephyr" / "Kconfig").read_text().splitlines()}
        assert {line for line in lines if line.startswith(("select", "imply"))} == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"package_version": "1.0"}, "package_version='1.0' is not of the form 1.2.3"),
        ({"package_version": "1.02.3"}, "package_version='1.02.3' is not of the form"),
        ({"package_vendor": "Example Works"}, "package_vendor='Example Works' must consist of letters"),
    ],
)
def test_what_a_package_cannot_say_of_itself(options: dict[str, str], message: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        with pytest.raises(ExportError, match=re.escape(message)):
            export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / "net", package=package, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_every_package_is_offered() -> None:
    assert tuple(PACKAGES) == get_args(Package)


def test_a_package_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "net" / "src").mkdir(parents=True)
    (tmp_path / "net" / "src" / "net.h").mkdir()  # in the way
    with pytest.raises(ExportError, match=r"cannot write .*net\.h: Is a directory"):
        export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / "net", name="net", package="arduino")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["net", "net.h", "src"]
    with pytest.raises(
        ExportError, match="package='zip' is not one of 'arduino', 'cmake', 'cmsis-pack', 'zephyr', or None"
    ):
        export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / "other", package="zip")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("old")
    with pytest.raises(ExportError, match="cannot write"):
        export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / "file", package="cmake")
    assert (tmp_path / "file").read_text() == "old"


@needs_cc
def test_the_layer_hook_is_called_behind_every_step(tmp_path: Path) -> None:
    net = nn.Sequential()
    net.add_module("odd??/name", nn.Linear(4, 4))
    net.add_module("act", nn.Sigmoid())
    export_c(net, torch.zeros(1, 4), tmp_path / "net.c", name="net", layer_hook=True)
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#define NET_LAYER_HOOK(index, layer) printf("%d %s\\n", index, layer)\n'
        '#include "net.c"\nint main(void) { float x[4] = {0}, y[4]; net_run(x, y); return 0; }\n'
    )
    assert compile_and_run(tmp_path / "main.c", folder=tmp_path).stdout == "0 odd__/name\n1 act\n"
    # Without a definition it is nothing.
    (tmp_path / "main.c").write_text(
        '#include "net.c"\nint main(void) { float x[4] = {0}, y[4]; net_run(x, y); return 0; }\n'
    )
    assert compile_and_run(tmp_path / "main.c", folder=tmp_path).stdout == ""
