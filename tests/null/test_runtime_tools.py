"""`run`, `inspect` and `profile` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from secateur.runtime import UserError
from secateur.tools import cli


@pytest.fixture
def secateur(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_run_prints_the_answer(secateur: Any, built: Path, image_file: Path) -> None:
    ask = ("run", built, "--image", image_file, "--prompt", "what", "--threads", 1)
    code, plain, notes = secateur(*ask)
    assert code == 0
    assert "tokens, the first after" in notes
    assert "visual tokens by segment: 3 -> 1; caches 4.2 KiB" in notes
    code, streamed, _ = secateur(*ask, "--stream")
    assert (code, streamed) == (0, plain)
    code, out, _ = secateur(*ask, "--json")
    (answer,) = json.loads(out)
    assert answer["text"] + "\n" == plain
    assert answer["metrics"]["new_tokens"] == len(answer["tokens"])
    code, out, _ = secateur(*ask, "--json", "--stream")
    *pieces, last = [json.loads(line) for line in out.splitlines()]
    assert "".join(piece["piece"] for piece in pieces) == last[0]["text"] == answer["text"]


def test_run_takes_options_by_their_names_in_transformers(secateur: Any, built: Path, image_file: Path) -> None:
    def ask(*more: object) -> list[int]:
        code, out, _ = secateur("run", built, "--image", image_file, "--prompt", "what", "--json", *more)
        assert code == 0
        return list(json.loads(out)[0]["tokens"])

    plain = ask()
    assert ask("--generation", f"suppress_tokens=[{plain[0]}]", "--generation", "min_new_tokens=3")[0] != plain[0]
    drawn = ask("--generation", "temperature=2", "--generation", "top_k=9", "--seed", 1)
    assert ask("--temperature", 2, "--top-k", 9, "--seed", 1) == drawn


def test_run_takes_unicode_and_addresses_where_asked_for(secateur: Any, built: Path, image_file: Path) -> None:
    """As Python gives arguments that are not UTF-8; a file's name may be such."""
    odd = b"a\xff".decode("utf-8", "surrogateescape")
    for more, says in (
        (["--prompt", odd], "prompt: character 1 of the text stands for the byte 0xFF, which is not UTF-8"),
        (["--prompt", "a", "--stop", odd], "stop: character 1 of the text stands for the byte 0xFF"),
        (["--prompt", "a", "--generation", f'stop_strings=["{odd}"]'], "stop: character 1 of the text stands for"),
    ):
        code, _, err = secateur("run", built, "--image", image_file, *more)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err
    odd_file = image_file.with_name(odd + ".png")
    odd_file.write_bytes(image_file.read_bytes())
    assert secateur("run", built, "--image", odd_file, "--prompt", "a")[0] == 0
    code, _, err = secateur("run", built, "--image", "http://127.0.0.1:9/a.png", "--prompt", "a")
    assert code == 2
    assert (
        "http://127.0.0.1:9/a.png is not a local file; download the image and give its path, or ask for it with" in err
    )
    code, _, err = secateur("run", built, "--image", "http://127.0.0.1:9/a.png", "--prompt", "a", "--allow-network")
    assert code == 2
    assert "http://127.0.0.1:9/a.png: cannot be fetched (" in err


def test_run_deals_images_to_rows(secateur: Any, tiny: ModuleType, tmp_path: Path, image_file: Path) -> None:
    two = tiny.build(tmp_path / "two", tiny.Tiny(batch=2, images=2))
    ask = ["run", two, "--prompt", "a", "--prompt", "b", *["--image", image_file] * 4, "--max-new-tokens", 2]
    code, out, _ = secateur(*ask, "--json")
    assert code == 0
    assert [len(answer["tokens"]) for answer in json.loads(out)] == [2, 2]
    code, _, err = secateur(*ask[:-4])
    assert code == 2
    assert "1 image(s), the bundle was compiled for 2 per row" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-new-tokens", 9], "compile with --new-tokens 9"),
        (["--prompt", "second"], "compile with --batch 2"),
        (["--temperature", -1], "temperature is -1.0"),
        (["--threads", 0], "threads is 0"),
        (["--top-k", 5], "top_k says how to draw tokens, but the likeliest is taken; give a temperature above 0"),
        (["--generation", "num_beams=4"], "generation: num_beams is not applied here"),
        (["--generation", "num_beams"], "--generation: 'num_beams' is not NAME=VALUE"),
        (["--generation", "max_time=soon"], "max_time is 'soon'; it must be a number of seconds"),
        (["--generation", "top_k=1", "--generation", "top_k=2"], "--generation: top_k is given twice"),
        (["--top-k", 1, "--generation", "top_k=2"], "generation: top_k is given twice"),
    ],
)
def test_run_refuses_in_one_line(secateur: Any, built: Path, image_file: Path, more: list[Any], says: str) -> None:
    code, out, err = secateur("run", built, "--image", image_file, "--prompt", "what", *more)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_inspect(secateur: Any, built: Path) -> None:
    code, out, _ = secateur("inspect", built)
    assert code == 0
    for words in (
        "Stages",
        "Segments",
        "Programs",
        "Ports",
        "Files",
        "projector.out",
        "past_key.0",
        "weights.safetensors",
    ):
        assert words in out
    code, out, _ = secateur("inspect", built, "--json")
    facts = json.loads(out)
    assert facts["manifest"] == json.loads((built / "manifest.json").read_text())
    assert sum(facts["segment_cache_bytes"].values()) == facts["cache_bytes"] == 2 * 4 * 8 * (35 + 33)
    assert facts["bytes"] == sum(p.stat().st_size for p in built.iterdir() if p.name != "manifest.json")


def test_caches_of_neighbouring_layers_fold() -> None:
    from secateur.runtime.schema import Port
    from secateur.tools.inspect import _fold_layers

    ports = [Port(name=f"past_key.{i}", dtype="fp32", shape=[1, 1, 9 if i < 2 else 5, 8]) for i in range(5)]
    assert [label for label, _ in _fold_layers(ports)] == ["past_key.0-1", "past_key.2-4"]


def test_profile(secateur: Any, built: Path, tiny: ModuleType, tmp_path: Path) -> None:
    unpruned = tiny.build(tmp_path / "unpruned", tiny.Tiny(features_per_image=4))
    target = tmp_path / "report.json"
    code, out, _ = secateur(
        "profile", built, "--against", unpruned, "--repeat", 3, "--warmup", 1, "--threads", 1, "--json", target
    )
    assert code == 0
    assert "unpruned over bundle" in out
    report = json.loads(target.read_text())
    for bundle in report["bundles"]:
        assert bundle["times"]["ttft"]["count"] == 3
        assert bundle["times"]["tpot"]["count"] == 3 * 7
        assert bundle["times"]["ttft"]["p50"] <= bundle["times"]["ttft"]["p90"] <= bundle["times"]["ttft"]["p99"]
        assert bundle["memory"]["peak"] >= bundle["memory"]["baseline"] > 2**20
    assert set(report["ratios"]) == {"vision", "prefill", "ttft", "tpot"}
    assert report["ratios"]["prefill"]["flops"] == 1.0
    code, out, _ = secateur("profile", built, "--repeat", 1, "--warmup", 0, "--no-memory", "--json", "-")
    assert json.loads(out)["bundles"][0]["memory"] is None


def test_the_synthetic_prompt_fills_the_bucket(built: Path) -> None:
    from secateur.runtime import Session
    from secateur.tools.measure import make_workload

    with Session(built, threads=1) as session:
        workload = make_workload(session)
        assert len(session.processor.encode(workload.prompts[0])) in (26, 27)
        with pytest.raises(UserError, match="9 new tokens"):
            make_workload(session, new_tokens=9)
