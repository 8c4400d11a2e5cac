"""The session against the same model in NumPy, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")

from secateur.runtime import Session, UserError
from secateur.runtime.errors import BundleError, SecateurError
from secateur.runtime.generate import TextStream
from secateur.runtime.kv import cache_bytes, decode_slots


@pytest.fixture(scope="module")
def session(built: Path) -> Session:
    return Session(built, threads=1)


def draw_images(rows: int, each: int) -> list[list[Image.Image]]:
    random = np.random.default_rng(1)
    return [
        [Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8)) for _ in range(each)] for _ in range(rows)
    ]


def close(got: np.ndarray, want: np.ndarray) -> None:
    """Equal to float32 rounding relative to the largest value."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("offset", [0, 5])
def test_tokens_are_the_models(tiny: ModuleType, tmp_path: Path, batch: int, images: int, offset: int) -> None:
    """Rows of different length, two segments, pruned prompts: slots and positions must all be right."""
    t = tiny.Tiny(batch=batch, images=images, position_offset=offset)
    prompts = ["<image>" * images + "abcdefghijk"[: 4 * row + 1] for row in range(batch)]
    pictures = draw_images(batch, images)
    with Session(tiny.build(tmp_path / "b", t), threads=1) as session:
        inputs = session.processor(prompts, pictures)
        answers = session.generate(prompts, pictures, ignore_eos=True)
        pixels = inputs.pixel_values.reshape(batch, images, 3, 8, 8)
        for row, answer in enumerate(answers):
            reference = tiny.Reference(t)
            assert answer.tokens == reference.greedy(inputs.prompt_ids(row), pixels[row], t.new_tokens)
            assert answer.finish_reason == "length"
            assert answer.metrics.prompt_tokens == len(inputs.prompt_ids(row))
            for stage, kept in answer.metrics.kept.items():
                assert kept[row].tolist() == reference.kept[stage].tolist()


def test_prefill_and_decode_by_hand(tiny: ModuleType, session: Session, image: Image.Image) -> None:
    inputs = session.processor(["<image>what"], [[image]])
    reference, request = tiny.Reference(tiny.Tiny()), session.request()
    want = reference.prefill(inputs.prompt_ids(0), inputs.pixel_values)
    got = session.prefill(request, inputs.input_ids, inputs.lengths, pixel_values=inputs.pixel_values)
    close(got[0], want)
    for step in range(8):
        token = int(np.argmax(want))
        want = reference.decode(token, step)
        close(session.decode(request, np.array([token]))[0], want)
    length = len(inputs.prompt_ids(0))
    for layer, removed in enumerate((0, 2)):
        cache = request.cache[f"past_key.{layer}"][0, 0]
        close(cache[: length - removed + 8], reference.keys[layer])
    # One row more than the prompt and its pads can hold is refused before anything runs.
    full = session.processor(["<image>" + "x" * 23], [[image]])
    session.prefill(request, full.input_ids, full.lengths, pixel_values=full.pixel_values)
    for _ in range(8):
        session.decode(request, np.array([7]))
    with pytest.raises(SecateurError, match="would write cache row 35, the capacity is 35"):
        session.decode(request, np.array([7]))


def test_slots_leave_out_what_caches_let_go_of(session: Session) -> None:
    manifest = session.manifest
    first, last = manifest.segments
    short = first.model_copy(update={"evicted": 2, "capacity": first.capacity - 2})
    shrunk = manifest.model_copy(update={"segments": [short, last]})
    lengths = np.array([20, 11])
    assert {name: slot.tolist() for name, slot in decode_slots(shrunk, lengths, 3).items()} == {
        "slot.s0": [20 - 2 + 3, 11 - 2 + 3], "slot.s1": [20 - last.removed + 3, 11 - last.removed + 3]
    }  # fmt: skip
    g, head = manifest.geometry, manifest.model.head_dim
    assert cache_bytes(manifest) - cache_bytes(shrunk) == 2 * 2 * g.batch * manifest.model.kv_heads * head * 4


def test_features_may_be_given(session: Session, image: Image.Image) -> None:
    inputs = session.processor(["<image>what"], [[image]])
    request = session.request()
    features = request.encode(inputs.pixel_values)
    encoded = request.prefill(inputs.input_ids, inputs.lengths)
    kept, last = request.kept["stage0"], request.kept["stage1"]
    first = session.prefill(session.request(), inputs.input_ids, inputs.lengths, features=features, kept=kept)
    assert np.array_equal(first, encoded)
    second = session.prefill(request, inputs.input_ids, inputs.lengths, features=features * 2, kept=kept)
    assert not np.array_equal(first, second)
    assert (request.kept["stage0"].tolist(), request.kept["stage1"].tolist()) == (kept.tolist(), last.tolist())
    with pytest.raises(UserError, match="either pixel_values or features"):
        session.prefill(request, inputs.input_ids, inputs.lengths)
    with pytest.raises(UserError, match="call encode first"):
        session.request().prefill(inputs.input_ids, inputs.lengths)
    with pytest.raises(UserError, match="kept without features"):
        request.prefill(inputs.input_ids, inputs.lengths, kept=kept)
    for wrong, says in (
        (None, r"original patches are needed; give kept, int64 \[1, 3\]"),
        (kept[:, :2], r"kept is int64\[1, 2\]; give int64\[1, 3\]"),
        (kept * 1.0, "kept is float64"),
        (kept + 2, "a row's patches are 0 to 3"),
    ):
        with pytest.raises(UserError, match=says):
            session.prefill(request, inputs.input_ids, inputs.lengths, features=features, kept=wrong)


def test_given_features_are_not_traced_to_another_image(tiny: ModuleType, tmp_path: Path) -> None:
    path = tiny.build(tmp_path / "b", tiny.Tiny(original=False, features_per_image=2))
    first, second = draw_images(2, 1)
    with Session(path, threads=1) as session:
        one, two = session.processor(["what"], [first]), session.processor(["what"], [second])
        other, request = session.request(), session.request()
        features = other.encode(two.pixel_values)
        session.prefill(request, one.input_ids, one.lengths, pixel_values=one.pixel_values)
        assert set(request.kept) == {"stage0", "stage1"}
        for given in (features, None):  # None: the same features once more
            request.prefill(two.input_ids, two.lengths, given)
            assert request.kept == {}
        other.prefill(two.input_ids, two.lengths)
        request.prefill(two.input_ids, two.lengths, features, other.kept["stage0"])
        for stage, kept in other.kept.items():
            assert request.kept[stage].tolist() == kept.tolist()


def test_placeholders_are_counted(session: Session, image: Image.Image) -> None:
    inputs = session.processor(["<image>what"], [[image]])
    request, ids, length = session.request(), inputs.input_ids, int(inputs.lengths[0])
    request.encode(inputs.pixel_values)
    needs = "a row needs 3, one for each token of 1 image.s. of 8x8 that is left, all before its end"
    for place, token, says in (
        (1, 50, f"row 0 has 2 placeholders .token 3. and 0 in its padding; {needs}"),
        (length - 2, 3, f"row 0 has 4 placeholders .token 3. and 0 in its padding; {needs}"),
        (length, 3, f"row 0 has 3 placeholders .token 3. and 1 in its padding; {needs}"),
    ):
        wrong = ids.copy()
        wrong[0, place] = token
        with pytest.raises(UserError, match=says):
            request.prefill(wrong, inputs.lengths)
    wrong = ids.copy()
    wrong[0, [1, length - 1]] = (50, 3)
    with pytest.raises(UserError, match="row 0 ends with its media; put text"):
        request.prefill(wrong, inputs.lengths)


def test_decode_before_prefill_and_wrong_arrays(session: Session, image: Image.Image) -> None:
    request = session.request()
    with pytest.raises(UserError, match="decode before prefill"):
        session.decode(request, np.array([1]))
    inputs = session.processor(["<image>what"], [[image]])
    with pytest.raises(UserError, match=r"encode: pixel_values has shape \[1, 3, 4, 4\]; give \[1, 3, 8, 8\]"):
        request.encode(inputs.pixel_values[:, :, :4, :4])
    with pytest.raises(UserError, match="pixel_values is <U4, not numbers"):
        request.encode(np.array(["what"]))
    with pytest.raises(UserError, match="input_features, but no sound; a row of this bundle holds 1 image"):
        request.encode(inputs.pixel_values, inputs.pixel_values)
    request.encode(inputs.pixel_values)
    with pytest.raises(UserError, match="a row of 28 tokens, the bundle was compiled for 27"):
        request.prefill(inputs.input_ids, np.array([28]))
    with pytest.raises(UserError, match="do not fit the geometry"):
        request.prefill(inputs.input_ids, np.array([3, 3]))
    with pytest.raises(UserError, match=r"prefill: input_ids has shape \[1, 5\]; give \[1, 27\]"):
        request.prefill(inputs.input_ids[:, :5], inputs.lengths)


def test_ids_are_of_the_vocabulary(session: Session, image: Image.Image) -> None:
    inputs = session.processor(["<image>what"], [[image]])
    request = session.request()
    request.encode(inputs.pixel_values)
    for token, says in ((-1, "go from -1 to"), (260, "to 260; the vocabulary's are 0 to 259")):
        for place in (2, -1):  # padding is looked up too
            wrong = inputs.input_ids.copy()
            wrong[0, place] = token
            with pytest.raises(UserError, match=f"^prefill: token ids .*{says}"):
                request.prefill(wrong, inputs.lengths)
    request.prefill(inputs.input_ids, inputs.lengths)
    for token in (-1, 260):
        with pytest.raises(UserError, match=f"^decode: token ids go from {token} to {token}; the vocabulary's are 0"):
            request.decode(np.array([token]))
    assert request.step == 0
    request.decode(np.array([259]))


def test_caches_are_written_in_place(session: Session, image: Image.Image) -> None:
    """Prefill's caches are decode's caches: one address for past and present of both programs."""
    request = session.request()
    ports = request._ports
    for name in ("key.0", "value.0", "key.1", "value.1"):
        places = {ports[p][f"{w}_{name}"].value.data_ptr() for p in ("prefill", "decode") for w in ("past", "present")}
        assert len(places) == 1
    assert ports["vision"]["features"] is ports["prefill"]["features"]
    assert cache_bytes(session.manifest) == sum(value.nbytes for value in request.cache.values())


def test_metrics(session: Session, image: Image.Image) -> None:
    answer = session.generate("what", image, ignore_eos=True, max_new_tokens=4)
    metrics = answer.metrics
    assert (metrics.new_tokens, len(metrics.step_s)) == (4, 3)
    assert metrics.ttft_s >= metrics.preprocess_s + metrics.vision_s + metrics.prefill_s > 0
    assert metrics.tpot_s == sorted(metrics.step_s)[1]
    assert metrics.visual_tokens == {"s0": 3, "s1": 1}
    assert {name: kept.shape for name, kept in metrics.kept.items()} == {"stage0": (1, 3), "stage1": (1, 1)}
    assert set(metrics.kept["stage1"][0]) <= set(metrics.kept["stage0"][0])
    assert metrics.as_json()["kept"]["stage0"] == metrics.kept["stage0"].tolist()
    one = session.generate("what", image, ignore_eos=True, max_new_tokens=1)
    assert (len(one.tokens), one.metrics.tpot_s) == (1, 0.0)


def test_streamed_pieces_make_the_text(session: Session, image: Image.Image) -> None:
    stream = session.generate("what", image, stream=True, ignore_eos=True)
    assert isinstance(stream, TextStream)
    with pytest.raises(UserError, match="not over"):
        _ = stream.generations
    text = "".join(stream)
    assert text == stream.generations[0].text == session.generate("what", image, ignore_eos=True).text


def test_rows_end_on_their_own(tiny: ModuleType, tmp_path: Path) -> None:
    """One row meets its end-of-sequence token early; the other's answer does not change."""
    pictures, prompts = draw_images(2, 1), ["abc", "xy"]
    directory = tiny.build(tmp_path / "b", tiny.Tiny(batch=2))
    with Session(directory, threads=1) as session:
        free = session.generate(prompts, pictures, ignore_eos=True)
    early = next(token for token in free[0].tokens[1:] if token not in free[1].tokens)
    tiny.resign(directory, model__eos_token_ids=[early])
    with Session(directory, threads=1) as session:
        stream = session.stream(prompts, pictures)
        rows = [piece.row for piece in stream]
        first, second = stream.generations
    cut = free[0].tokens.index(early) + 1
    assert (first.tokens, first.finish_reason) == (free[0].tokens[:cut], "eos")
    assert (second.tokens, second.finish_reason) == (free[1].tokens, "length")
    assert set(rows) == {0, 1}


def test_stop_strings(session: Session, image: Image.Image) -> None:
    whole = session.generate("what", image, ignore_eos=True).text
    stop = whole[2:4]
    answer = session.generate("what", image, ignore_eos=True, stop=stop)
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.find(stop)]
    assert stop not in answer.text


def test_cancellation(session: Session, image: Image.Image) -> None:
    cancel = threading.Event()
    stream = session.stream("what", image, ignore_eos=True, cancel=cancel)
    for _ in stream:
        cancel.set()
    assert stream.generations[0].finish_reason == "cancelled"
    assert len(stream.generations[0].tokens) < 8
    answer = session.generate("what", image, cancel=cancel)
    assert (answer.finish_reason, answer.tokens) == ("cancelled", [])
    with session.stream("what", image, ignore_eos=True) as closed:
        next(closed)
    assert closed.generations[0].finish_reason == "cancelled"
    assert list(closed) == []
    never = session.stream("what", image)
    never.close()
    assert never.generations[0].tokens == []


def test_sampling_is_repeatable(session: Session, image: Image.Image) -> None:
    def ask(seed: int) -> list[int]:
        return session.generate("what", image, ignore_eos=True, temperature=3.0, top_k=50, top_p=0.9, seed=seed).tokens

    assert ask(1) == ask(1)
    assert len({tuple(ask(seed)) for seed in range(5)}) > 1


def test_generation_defaults_of_the_checkpoint(tiny: ModuleType, bundle: Path, image: Image.Image) -> None:
    (bundle / "generation_config.json").write_text('{"max_new_tokens": 3, "repetition_penalty": 1e9}')
    tiny.relist(bundle)
    with Session(bundle, threads=1) as session:
        answer = session.generate("what", image, ignore_eos=True)
        assert len(answer.tokens) == len(set(answer.tokens)) == 3
        assert len(session.generate("what", image, ignore_eos=True, max_new_tokens=5).tokens) == 5
        again = session.generate("what", image, ignore_eos=True, repetition_penalty=1.0, max_new_tokens=8)
        assert len(set(again.tokens)) < 8
    (bundle / "generation_config.json").write_text('{"max_new_tokens": 3000}')
    tiny.relist(bundle)
    with Session(bundle, threads=1) as session:
        assert len(session.generate("what", image, ignore_eos=True).tokens) == 8


def test_generation_defaults_that_are_none(tiny: ModuleType, bundle: Path, image: Image.Image) -> None:
    (bundle / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    tiny.relist(bundle)
    with (
        Session(bundle, threads=1) as session,
        pytest.raises(BundleError, match=r"generation_config.json: max_new_tokens is 'many'"),
    ):
        session.generate("what", image)


def test_more_tokens_than_capacity(session: Session, image: Image.Image) -> None:
    with pytest.raises(UserError, match=r"9 new tokens, the bundle's caches hold 8; .* compile with --new-tokens 9"):
        session.generate("what", image, max_new_tokens=9)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        session.generate("what", image, max_new_tokens=0)


def test_slots_are_checked_before_running(session: Session) -> None:
    slots = decode_slots(session.manifest, np.array([27]), 7)
    assert {name: slot.tolist() for name, slot in slots.items()} == {"slot.s0": [34], "slot.s1": [32]}
    with pytest.raises(SecateurError, match=r"segment s0.*capacity is 35; generate at most 8 new tokens"):
        decode_slots(session.manifest, np.array([27]), 8)


def test_threads_share_a_session(session: Session) -> None:
    pictures = [row[0] for row in draw_images(6, 1)]
    alone = [session.generate("what", picture, ignore_eos=True).tokens for picture in pictures]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda p: session.generate("what", p, ignore_eos=True).tokens, pictures * 3))
    assert together == alone * 3


def test_requests_are_reused(session: Session, image: Image.Image) -> None:
    session.generate("what", image)
    kept = session._idle[0]
    session.generate("what", image)
    assert session._idle == [kept]


def test_a_graph_that_makes_nan(tiny: ModuleType, tmp_path: Path, image: Image.Image) -> None:
    with Session(tiny.build(tmp_path / "nan", tiny.Tiny(nan=True)), threads=1) as session:
        with pytest.raises(SecateurError, match="program prefill: the outputs are not finite") as caught:
            session.generate("what", image)
        assert caught.value.exit_code == 1
        assert session._idle == []


def test_a_closed_session(built: Path, image: Image.Image) -> None:
    session = Session(built, threads=1)
    session.close()
    session.close()
    with pytest.raises(UserError, match="the session is closed"):
        session.generate("what", image)


def test_images_and_prompts_of_the_wrong_kind(session: Session, image: Image.Image) -> None:
    with pytest.raises(UserError, match="one image for a list of prompts"):
        session.generate(["what"], image)
    accepted = "(is not an image; give a path, a file object|1 bytes: not an image Pillow can read)"
    for prompt, wrong in (("what", 5), ("what", [5]), (["what"], 5), (["what"], [5]), ("what", b"x")):
        with pytest.raises(UserError, match=accepted):
            session.generate(prompt, wrong)  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r"give exactly 1$"):
        session.generate([], [])
    for nothing in (5, None, {"role": "user", "content": "what"}):
        with pytest.raises(UserError, match="is not a prompt; give text, a list of messages, or a list of those"):
            session.generate(nothing, image)  # type: ignore[call-overload]
    assert session.generate(["what"], [image])[0].tokens == session.generate("what", [image]).tokens
    message: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    assert session.generate(message).tokens == session.generate("", image).tokens


def test_spoilt_bundles_do_not_open(tiny: ModuleType, bundle: Path) -> None:
    data = bytearray((bundle / "decode.onnx").read_bytes())
    data[100] ^= 1
    (bundle / "decode.onnx").write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"decode.onnx: altered"):
        Session(bundle)
    (bundle / "decode.onnx").write_bytes(b"not a graph")
    tiny.relist(bundle)
    with pytest.raises(BundleError, match=r"decode.onnx: ONNX Runtime .* refuses the graph"):
        Session(bundle)
    (bundle / "decode.onnx").write_bytes((bundle / "prefill.onnx").read_bytes())
    tiny.relist(bundle)
    with pytest.raises(BundleError, match=r"decode.onnx: input features is .* in the graph, missing in the manifest"):
        Session(bundle)


def test_weights_are_hashed_on_request(bundle: Path) -> None:
    data = bytearray((bundle / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "weights.safetensors").write_bytes(bytes(data))
    Session(bundle, threads=1).close()
    with pytest.raises(BundleError, match=r"weights.safetensors: altered"):
        Session(bundle, verify="full")


def test_backends(tiny: ModuleType, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no backend 'abacus' \(available: onnxruntime, onnxruntime-cuda, .*\)"):
        Session(bundle, backend="abacus")
    with pytest.raises(UserError, match="threads is 0"):
        Session(bundle, threads=0)
    tiny.resign(bundle, provider="CUDAExecutionProvider")
    with pytest.raises(UserError, match=r"compiled for CUDAExecutionProvider, .* on the CPU; leave the backend to"):
        Session(bundle)
    tiny.resign(bundle, provider=None)
    with pytest.raises(UserError, match=r"backend tensorrt: the bundle was compiled for onnxruntime; compile it with"):
        Session(bundle, backend="tensorrt")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed; pip install 'secateur\[cpu\]'"):
        Session(bundle)


def test_a_bundle_of_an_unsupported_type(tiny: ModuleType, bundle: Path) -> None:
    programs = json.loads((bundle / "manifest.json").read_text())["programs"]
    for port in (port for p in programs.values() for port in (*p["inputs"], *p["outputs"])):
        if port["name"].startswith(("past_", "present_")):
            port["dtype"] = "bf16"
    tiny.resign(bundle, dtype="bf16", programs=programs)
    with pytest.raises(UserError, match=r"computes in bf16, .* compile with --dtype fp32"):
        Session(bundle, threads=1)
