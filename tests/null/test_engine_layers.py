"""`inspect --layers`: what it says of engines that open, of those that do not, and of bundles without any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from secateur.exporters import tensorrt_inspector, tensorrt_network
from secateur.exporters.tensorrt_network import ParsedLayer
from secateur.runtime.errors import SecateurError
from secateur.tools import cli

PARSED = [ParsedLayer("ATTENTION_INPUT", "attend", "attend"), ParsedLayer("SHUFFLE", "reshape", None)]


@pytest.fixture
def secateur(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def engines(bundle: Path, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A bundle with files for engines, of which prefill and decode share one; its graphs parse into ``PARSED``."""
    files = {"vision": "vision.engine", "prefill": "llm.engine", "decode": "llm.engine"}
    for file in files.values():
        (bundle / file).write_bytes(b"plan")
    tiny.relist(bundle)
    tiny.resign(bundle, target="tensorrt-rtx", engines={"weights": "inputs"},
                **{f"programs__{name}__engine": file for name, file in files.items()})  # fmt: skip
    asked: list[str] = []
    monkeypatch.setattr(
        tensorrt_network, "parsed_layers", lambda graph, *, flavour, weights: asked.append(weights) or PARSED
    )
    yield bundle
    assert set(asked) <= {"inputs"}


def test_a_bundle_without_engines_is_refused(secateur: Any, bundle: Path) -> None:
    assert secateur("inspect", bundle, "--layers") == (
        2, "", f"error: --layers: {bundle}: holds no engines: its target is onnxruntime; compile with --target "
        "tensorrt-rtx or tensorrt\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--program", "decode"), "--program: goes with --layers; say --layers --program decode"),
        (("--layers", "--program", "llm"), "--program: no program 'llm' (available: vision, prefill, decode)"),
    ],
)
def test_programs_that_cannot_be_shown(secateur: Any, bundle: Path, options: tuple[str, ...], text: str) -> None:
    assert secateur("inspect", bundle, *options) == (2, "", f"error: {text}\n")


def test_without_a_driver_the_parsed_network_is_shown(
    secateur: Any, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_inspector, "has_driver", lambda: False)
    code, out, err = secateur("inspect", engines, "--layers", "--program", "decode")
    assert (code, err) == (0, "")
    assert ["ATTENTION_INPUT" in out, "SHUFFLE" in out, "decode.onnx" in out] == [True] * 3
    assert out.strip().endswith(
        "These are the layers the parser makes of the graphs; the builder fuses further. The engines themselves are "
        f"not shown: {engines}/llm.engine: no GPU driver is here (libcuda.so.1)"
    )


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library that opens engines; ``told`` is what its inspector says, an exception what it fails with."""
    pytest.importorskip("polygraphy", reason="needs the extra tensorrt or tensorrt-rtx")
    state = SimpleNamespace(told="{}")

    def open_engine(plan: bytes) -> Any:
        assert plan == b"plan"
        if isinstance(state.told, Exception):
            raise state.told
        return SimpleNamespace(
            create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _form: state.told)
        )

    library = SimpleNamespace(
        trt=SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON=1)),
        loaders=SimpleNamespace(engine_from_bytes=open_engine),
    )
    monkeypatch.setattr(tensorrt_inspector, "has_driver", lambda: True)
    monkeypatch.setattr(tensorrt_inspector, "load_library", lambda flavour: library)
    return state


def test_an_engine_that_opens_is_shown_beside_its_network(
    secateur: Any, engines: Path, opened: SimpleNamespace
) -> None:
    opened.told = json.dumps({"Layers": [{"Name": "a", "LayerType": "kgen"}, {"Name": "b", "LayerType": "gemm"}] * 2})
    code, out, err = secateur("inspect", engines, "--layers", "--json")
    found = json.loads(out)["programs"]
    assert [(one["program"], one["engine"]) for one in found] == [
        ("vision", "vision.engine"), ("prefill", "llm.engine")
    ]  # fmt: skip
    assert [layer["LayerType"] for layer in found[0]["engine_layers"]] == ["kgen", "gemm", "kgen", "gemm"]
    assert found[0]["types"] == {"ATTENTION_INPUT": 1, "SHUFFLE": 1}
    code, out, err = secateur("inspect", engines, "--layers", "--program", "vision")
    assert (code, err) == (0, "")
    assert "vision.engine" in out
    assert "kgen" in out
    assert "not shown" not in out


def test_an_engine_without_details_gives_names(opened: SimpleNamespace, engines: Path) -> None:
    opened.told = json.dumps({"Layers": ["a", "b"]})
    assert tensorrt_inspector.engine_layers(engines / "llm.engine", flavour="tensorrt-rtx") == [
        {"Name": "a"}, {"Name": "b"}
    ]  # fmt: skip


def test_an_engine_of_another_gpu_is_not_opened(opened: SimpleNamespace, engines: Path) -> None:
    opened.told = RuntimeError("the engine was built for SM 89")
    with pytest.raises(SecateurError) as caught:
        tensorrt_inspector.engine_layers(engines / "llm.engine", flavour="tensorrt-rtx")
    assert str(caught.value) == (
        f"{engines}/llm.engine: tensorrt-rtx does not open the engine: the engine was built for SM 89"
    )


def test_an_altered_engine_is_not_handed_to_the_library(secateur: Any, engines: Path, opened: SimpleNamespace) -> None:
    (engines / "llm.engine").write_bytes(b"nalp")
    code, out, err = secateur("inspect", engines, "--layers")
    assert (code, out) == (2, "")
    assert "llm.engine: altered: its SHA-256 is not the manifest's" in err
