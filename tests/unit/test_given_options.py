"""No option is given in vain: each has an answer here, and each that needs something else says so where that lacks.

The walk takes the options from the command line's own registry and the arguments from the functions' signatures, so
that a new one without an answer fails.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import typer
from PIL import Image

import secateur
from secateur.runtime.errors import UserError
from secateur.tools import cli


class Needs(NamedTuple):
    """What is run without what the option needs, and a part of the error or warning; ``code`` 0 is a warning."""

    arguments: str
    says: str
    code: int = 2


USED = "always used, or refused by its value"
GIVES_LEAVE = "allows what would be refused: where nothing would be, there is nothing to say"
PRINTS = "says what is printed"

VIDEO, SOUND = "{model} --fps 2", "{model} --audio-in-video"
NO_VIDEO = "fps is 2.0, but there is no video; give --frames as well, or leave --fps out"
NO_SOUND = "audio_in_video is True, but there is no video with sound"
ENGINES = "target onnxruntime builds no engines"
STOPPED = "{model} --stop-after drop_noops "
NO_MODEL = "says nothing: no model is compared without MODEL_DIR"
GEOMETRY = {
    "text_tokens": USED, "new_tokens": USED, "batch": USED,
    "images": Needs("{model} --images 1 --frames 4", "1 images beside a video of 4 frames"),
    "image_size": Needs("{model} --image-size 448x448", "--image-size"),
    "frames": Needs("{model} --frames 4", "leave --frames out"),
    "fps": Needs(VIDEO, NO_VIDEO),
    "audio_seconds": Needs("{model} --audio-seconds 4", "leave --audio-seconds out"),
    "audio_in_video": Needs(SOUND, NO_SOUND),
}  # fmt: skip
BUDGET = {
    "keep": Needs("{model} --keep 0.5", "--keep 0.5: recipe none keeps every token"),
    "mean_keep": Needs("{model} --mean-keep 0.5", "none"),
    "flops_keep": Needs("{model} --flops-keep 0.5", "none"),
}
SHARED = {
    "debug": PRINTS, "as_json": PRINTS,
    "quiet": Needs("--quiet --verbose", "--quiet and --verbose say opposite things; give one of them"),
    "verbose": Needs("--verbose --quiet", "--quiet and --verbose say opposite things; give one of them"),
}  # fmt: skip


def say(text: str, found: dict[str, str | Needs]) -> dict[str, str | Needs]:
    """The same for another verb: what stands before the options of every sample is ``text``."""
    return {
        name: Needs(one.arguments.replace("{model}", text), one.says, one.code) if isinstance(one, Needs) else one
        for name, one in found.items()
    }


ANSWERS: dict[str, dict[str, str | Needs]] = {
    "compile": say("{model} -o {out}", {**GEOMETRY, **BUDGET}) | {
        "out": Needs(STOPPED + "-o {out}", "--output says nothing beside --stop-after", 0),
        "recipe": USED, "target": USED, "dtype": USED, "dump_dir": USED,
        "geometry": Needs("{model} -o {out} --images 2 --geometry images=1", "--images: says nothing: every"),
        "sm": Needs("{model} -o {out} --sm 89", "--sm: target onnxruntime has no GPU architecture"),
        "engine_weights": Needs("{model} -o {out} --engine-weights inputs", ENGINES),
        "strip_weights": Needs("{model} -o {out} --strip-weights", ENGINES),
        "workspace": Needs("{model} -o {out} --workspace 1GiB", ENGINES),
        "opt_level": Needs("{model} -o {out} --opt-level 3", ENGINES),
        "version_compatible": Needs("{model} -o {out} --version-compatible", ENGINES),
        "hardware_compatible": Needs("{model} -o {out} --hardware-compatible", ENGINES),
        "timing_cache": Needs("{model} -o {out} --timing-cache {out}", ENGINES),
        "score_plugins": Needs("{model} -o {out} --score-plugins", ENGINES),
        "weights": Needs(STOPPED + "--weights stream", "weights says nothing", 0),
        "loops": Needs("{model} -o {out} --loops unroll", "--loops: target onnxruntime has loops"),
        "force": Needs(STOPPED + "--force", "force says nothing", 0),
        "self_test": Needs(STOPPED + "--self-test full", "self_test says nothing", 0),
        "device_memory": Needs(STOPPED + "--device-memory 1GiB", "says nothing beside --stop-after", 0),
        "ignore_forecast": Needs(STOPPED + "--ignore-forecast", "says nothing beside --stop-after", 0),
        "stop_after": Needs(STOPPED + "--geometry images=1 --geometry images=2", "--stop-after: the programs of one"),
    },
    "explain": say("none {model}", {**GEOMETRY, **BUDGET}) | {
        "target": USED, "dtype": "decides bytes",
        "loops": Needs("none {model} --loops unroll", "--loops: says nothing without a target"),
    },
    "run": {
        "prompt": USED, "image": USED, "video": USED, "audio": USED, "max_new_tokens": USED, "stop": USED,
        "repetition_penalty": USED, "generation": USED, "full_check": USED, "max_image_pixels": USED,
        "allow_network": GIVES_LEAVE, "temperature": USED,
        "threads": "always used on the CPU; test_what_a_backend_has_no_use_for_is_named",
        "video_fps": Needs("{bundle} -p x -i {image} --video-fps 2", "--video-fps: says nothing: no video is given"),
        "stream": Needs("{bundle} -p x -p y -i {image} --stream", "--stream: says nothing: several answers"),
        "top_k": Needs("{bundle} -p x -i {image} --top-k 5", "top_k says how to draw tokens, but the likeliest"),
        "top_p": Needs("{bundle} -p x -i {image} --top-p 0.5", "top_p says how to draw tokens"),
        "seed": Needs("{bundle} -p x -i {image} --seed 3", "seed 3 says nothing: the likeliest token is taken", 0),
    },
    "profile": {
        "against": USED, "repeat": USED, "warmup": USED, "new_tokens": USED, "prompt": USED, "image": USED,
        "geometry": USED, "threads": USED, "memory": USED, "json_file": PRINTS,
    },
    "inspect": {
        "layers": Needs("{bundle} --layers", "engine"),
        "program": Needs("{bundle} --program prefill", "--program: goes with --layers"),
    },
    "verify": {
        "recipe": Needs("{bundle} --recipe fastv", f"--recipe: {NO_MODEL}"),
        "rows": Needs("{bundle} --rows 8", f"--rows: {NO_MODEL}"),
        "seed": Needs("{bundle} --seed 0", f"--seed: {NO_MODEL}"),
        "threads": Needs("{bundle} --threads 1", "threads say nothing to the self-test: no program is run", 0),
    },
    "lint": {
        "target": "what the graph is held against", "rules": Needs("{bundle} --rules", "--rules lists rules"),
        "dtype": Needs("--rules --dtype fp16", "--dtype: says nothing: --rules looks at no graph"),
        "sm": Needs("{bundle} --sm 89", "--sm: says nothing: target onnxruntime builds no engines"),
    },
    "sweep": {
        "recipes": USED, "questions": USED, "new_tokens": USED, "text_tokens": USED, "repeat": USED, "out": USED,
        "threads": USED, "fresh": GIVES_LEAVE,
        "image_size": "as in compile",
        "keeps": Needs("{model} {data} --recipes none --keeps 0.5", "--keeps: says nothing: recipe none keeps every"),
        "budget": Needs("{model} {data} --recipes none --budget keep", "--budget: says nothing: recipe none keeps"),
        "oracle": Needs("{model} {data} --oracle", "--oracle: nobody knows the best patches"),
    },
    "compare": {
        **say("fx oracle --model {model} --recipe none", {n: GEOMETRY[n] for n in GEOMETRY}),
        "model": "needed by runs that are no bundle, tells ties of those that are", "answer_tokens": USED,
        "recipe": Needs("{bundle} {bundle} --recipe fastv", "a recipe needs the model it is for"),
        "keep": Needs("fx oracle --model {model} --keep 0.5", "--keep: a keep ratio needs a recipe"),
        "questions": USED, "data": USED, "force_keep": USED, "out": USED,
        "passes": Needs("{bundle} {bundle} --passes", "--passes: passes are looked at in a model"),
        "seed": Needs("fx oracle --model {model} --data {data} --seed 0", "--seed: says nothing: rows of data are not"),
        "threads": Needs("fx oracle --threads 1", "threads say nothing: neither fx nor oracle runs a bundle"),
    },
    "calibrate": {
        "out": USED, "recipe": USED, "keep": USED, "image_size": "as in compile", "questions": USED, "curve": USED,
        "mass": USED, "tau": USED, "write_recipe": USED, "force": GIVES_LEAVE,
    },
    "recipes": {
        "as_yaml": Needs("--yaml", "--yaml is for one recipe"),
        "vocabulary": Needs("fastv --vocabulary", "--vocabulary is that of all recipes"),
    },
}  # fmt: skip


def options_of(verb: str) -> list[str]:
    group: Any = typer.main.get_command(cli.app)
    found = [p for p in group.get_command(None, verb).params if p.param_type_name == "option" and p.name != "help"]
    return [cast(str, parameter.name) for parameter in found]


def answer_of(verb: str, option: str) -> str | Needs | None:
    return ANSWERS.get(verb, {}).get(option) or SHARED.get(option)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_has_an_answer(verb: str) -> None:
    options = options_of(verb)
    assert [option for option in options if answer_of(verb, option) is None] == []
    assert [option for option in ANSWERS[verb] if option not in options] == []


@pytest.fixture(scope="module")
def places(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("given")
    path = Path(__file__).parents[1] / "null" / "tiny_bundle.py"
    spec = importlib.util.spec_from_file_location("tiny_bundle", path)
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tiny
    spec.loader.exec_module(tiny)
    Image.new("RGB", (8, 8), "red").save(folder / "image.png")
    (folder / "questions.jsonl").write_text('{"image": "image.png", "question": "what?", "answer": "red"}\n')
    return {
        "model": model_dir(), "bundle": tiny.build(folder / "bundle"), "image": folder / "image.png",
        "data": folder / "questions.jsonl", "out": folder / "out",
    }  # fmt: skip


SAMPLES = [
    (verb, option, answer)
    for verb in cli.VERBS
    for option, answer in {**ANSWERS[verb], **SHARED}.items()
    if isinstance(answer, Needs)
]


@pytest.mark.parametrize(("verb", "option", "needs"), SAMPLES, ids=[f"{verb}-{option}" for verb, option, _ in SAMPLES])
def test_an_option_that_lacks_what_it_needs_says_so(
    capsys: pytest.CaptureFixture[str], places: dict[str, Path], verb: str, option: str, needs: Needs
) -> None:
    arguments = [part.format(**places) for part in needs.arguments.split()]
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, *arguments])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "warning: "))]
    assert any(needs.says in line for line in lines), err
    assert stop.value.code == needs.code
    assert "Traceback" not in err
    assert not places["out"].exists()
    shutil.rmtree("sweep", ignore_errors=True)


# -- the same in Python -----------------------------------------------------------------------------------

HERE = "this file"
"""Where the command line's options are the same arguments, its samples hold for them."""
ARGUMENTS: dict[str, dict[str, str]] = {
    "compile": dict.fromkeys(
        ("model_dir", "out", "recipe", "keep", "mean_keep", "flops_keep", "geometry", "target", "dtype", "sm",
         "engines", "weights", "loops", "force", "dump_dir", "stop_after", "expected", "self_test"), HERE,
    ) | {"progress": "told"},
    "explain": dict.fromkeys(
        ("recipe", "model_dir", "keep", "mean_keep", "flops_keep", "geometry", "target", "dtype", "loops"), HERE
    ) | {"progress": "told"},
    "verify": {"bundle": USED, "model_dir": USED, "how": "test_arguments_in_vain: those of verify_bundle"},
    "calibrate": {"model_dir": USED, "data": USED, "how": "those of calibrate_model, always used"},
    "compare": {"a": USED, "b": USED, "how": "test_arguments_in_vain: those of compare_named"},
    "Geometry": dict.fromkeys(
        ("batch", "images", "text_tokens", "new_tokens", "image_size", "frames", "fps", "audio_seconds",
         "audio_in_video"), "test_arguments_in_vain",
    ),
    "Session": {
        "path": USED, "verify": USED, "backend": USED, "threads": "test_arguments_in_vain",
        "cuda_graphs": "test_arguments_in_vain", "max_image_pixels": USED,
    },
    "Session.generate": {"prompt": USED, "images": USED, "stream": USED, "how": "those of stream"},
    "Session.stream": dict.fromkeys(
        ("prompt", "images", "videos", "audio", "max_new_tokens", "temperature", "repetition_penalty", "stop",
         "ignore_eos", "generation", "cancel", "variant"), USED,
    ) | dict.fromkeys(("video_fps", "audio_rate", "top_k", "top_p", "seed"), "test_arguments_in_vain")
    | {"allow_network": GIVES_LEAVE},
    "Session.request": {"variant": USED},
    "Session.prefill": dict.fromkeys(
        ("request", "input_ids", "lengths", "pixel_values", "input_features", "features", "kept"),
        "refused beside each other: test_session.py",
    ),
    "Session.decode": {"request": USED, "tokens": USED},
    "Session.close": {},
}  # fmt: skip


def public_functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for name in secateur.__all__:
        value = getattr(secateur, name)
        if not callable(value) or (isinstance(value, type) and issubclass(value, Exception)):
            continue
        found[name] = value
        if name == "Session":
            members = {n: v for n, v in vars(value).items() if inspect.isfunction(v) and not n.startswith("_")}
            found |= {f"Session.{n}": v for n, v in members.items()}
    return found


def test_every_argument_of_every_public_function_has_an_answer() -> None:
    functions = public_functions()
    assert set(functions) == set(ARGUMENTS)
    for name, function in functions.items():
        assert set(inspect.signature(function).parameters) - {"self"} == set(ARGUMENTS[name]), name


def ask(places: dict[str, Path], **how: Any) -> None:
    with secateur.Session(places["bundle"], threads=1) as session:
        session.generate("x", places["image"], max_new_tokens=1, **how)


IN_VAIN: dict[str, tuple[Callable[[dict[str, Path]], object], str]] = {
    "images": (lambda p: secateur.Geometry(images=1, frames=4), "1 images beside a video of 4 frames"),
    "sizes": (lambda p: secateur.Geometry(images=1, image_size=((4, 4), (8, 8))), "2 sizes for 1 images"),
    "fps": (lambda p: secateur.Geometry(fps=3.0), "fps is 3.0, but there is no video"),
    "audio_in_video": (lambda p: secateur.Geometry(audio_in_video=False), "but there is no video with sound"),
    "video_fps": (lambda p: ask(p, video_fps=2.0), "no video is given"),
    "audio_rate": (lambda p: ask(p, audio_rate=16000), "audio_rate: says nothing: no sound is given"),
    "top_k": (lambda p: ask(p, top_k=5), "top_k says how to draw tokens"),
    "top_k, none": (lambda p: ask(p, top_k=-5), "top_k is -5"),
    "top_p": (lambda p: ask(p, top_p=0.5), "top_p says how to draw tokens"),
    "threads": (lambda p: secateur.Session(p["bundle"], backend=object(), threads=1), "opened already"),  # type: ignore[arg-type]
    "cuda_graphs": (lambda p: secateur.Session(p["bundle"], backend=object(), cuda_graphs=True), "opened already"),  # type: ignore[arg-type]
    "verify": (lambda p: secateur.verify(p["bundle"], rows=3), "--rows: says nothing"),
    "compare, seed": (lambda p: secateur.compare("fx", "oracle", data=p["data"], seed=2), "--seed: says nothing"),
}


@pytest.mark.parametrize("case", IN_VAIN)
def test_arguments_in_vain(places: dict[str, Path], case: str) -> None:
    call, says = IN_VAIN[case]
    with pytest.raises(UserError) as caught:
        call(places)
    assert says in str(caught.value)


def test_a_seed_of_a_greedy_search_is_a_warning(places: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ask(places, temperature=1.0, seed=3)
        assert caplog.messages == []
        ask(places, seed=3)
    assert caplog.messages == ["seed 3 says nothing: the likeliest token is taken, none is drawn"]


def test_what_a_backend_has_no_use_for_is_named(places: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), secateur.Session(places["bundle"], threads=1, cuda_graphs=True):
        assert caplog.messages == ["cuda_graphs says nothing to backend onnxruntime"]


def test_plain_options_go_to_the_geometries_that_can_have_them() -> None:
    from secateur.compiler.geometry_text import read_geometries

    given = {"fps": 4.0, "image_size": (56, 56), "images": 2}
    video, pictures = read_geometries(["frames=8", "text_tokens=9"], given)
    assert (video.images, video.frames, video.fps, video.image_size) == (0, 8, 4.0, (56, 56))
    assert (pictures.images, pictures.frames, pictures.text_tokens) == (2, 0, 9)
    with pytest.raises(UserError, match=r"--fps: says nothing: every --geometry has its own, or no use for it"):
        read_geometries(["images=1", "images=2"], {"fps": 2.0})


COUNTS = ("batch", "images", "text_tokens", "new_tokens", "frames", "audio_seconds")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [10**9, 10**30, -1])
def test_counts_that_would_take_the_machine_are_refused(name: str, value: int) -> None:
    with pytest.raises(
        UserError, match=rf"{name} is -?\d+; give --{name.replace('_', '-')} a number of at (most|least)"
    ):
        secateur.Geometry(**{name: value})  # type: ignore[arg-type]
