"""What a manifest says in several places must be the same in all of them: segments, caches, ports, sizes, forecast.

Checked before anything is allocated, with work that does not grow with the numbers themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from secateur.runtime.schema_input_checks import check_preprocessing

if TYPE_CHECKING:
    from secateur.runtime.schema import Manifest, Port, Program, Variant

PLACES = 1 << 25
"""Visual tokens of all rows: more than that many are a lie, since each has an entry in lists of the runtime."""


def check_part(part: Manifest | Variant, whole: Manifest) -> None:
    """Raise ValueError unless one geometry of a manifest is consistent in itself and with the model."""
    from secateur.runtime.schema import PROGRAMS

    if set(part.programs) != set(PROGRAMS):
        raise ValueError(f"programs are {', '.join(part.programs)} instead of {', '.join(PROGRAMS)}")
    _check_segments(part, whole.model.layers)
    sizes = part.geometry
    if sizes.batch * sizes.places > PLACES:
        raise ValueError(f"geometry: {sizes.places} tokens of media in each of {sizes.batch} rows")
    if sizes.sequence != sizes.text_tokens + sizes.features:
        raise ValueError(
            f"geometry: a sequence of {sizes.sequence} is not {sizes.text_tokens} of text and {sizes.features} of media"
        )
    _check_ports(part)
    _check_caches(part, whole)
    if part.preprocessing is not None:
        check_preprocessing(part, part.preprocessing, whole.model.image_token_id)
    if part.forecast is not None:
        _check_forecast(part)


def _check_segments(part: Manifest | Variant, layers: int) -> None:
    """Runs of layers follow each other, and their lengths and capacities add up."""
    reached, names = 0, set()
    for segment in part.segments:
        if segment.first_layer != reached or segment.last_layer <= reached:
            break
        reached = segment.last_layer
        names.add(segment.name)
    if reached != layers or len(names) != len(part.segments):
        raise ValueError("segments do not cover every layer once, in order")
    for segment in part.segments:
        where = f"segment {segment.name}"
        if segment.length + segment.removed != part.geometry.sequence:
            raise ValueError(f"{where}: length + removed is not the sequence's length")
        if segment.evicted >= segment.length:
            raise ValueError(f"{where}: evicted is not below its length")
        held = segment.length - segment.evicted
        if segment.capacity < held:
            raise ValueError(f"{where}: capacity is below the rows it holds")
        if segment.capacity != held + part.geometry.new_tokens:
            raise ValueError(
                f"{where}: a capacity of {segment.capacity} is not its {held} rows and {part.geometry.new_tokens} new"
            )


def _check_ports(part: Manifest | Variant) -> None:
    """The ports that every request writes or reads by name are there, with the shapes that the sizes say."""
    batch, sequence, features = part.geometry.batch, part.geometry.sequence, part.geometry.features
    inputs = {name: _by_name(name, program.inputs, "input") for name, program in part.programs.items()}
    outputs = {name: _by_name(name, program.outputs, "output") for name, program in part.programs.items()}
    slots = {f"slot.{segment.name}": [batch] for segment in part.segments}
    wanted: tuple[tuple[str, Mapping[str, Port], dict[str, list[int] | None]], ...] = (
        ("input of vision", inputs["vision"], {"pixel_values": None}),
        ("output of vision", outputs["vision"], {"features": [batch, features]}),
        ("input of prefill", inputs["prefill"],
         {"input_ids": [batch, sequence], "lengths": [batch], "features": [batch, features]}),
        ("output of prefill", outputs["prefill"], {"logits": [batch]}),
        ("input of decode", inputs["decode"], {"input_ids": [batch, 1], **slots}),
        ("output of decode", outputs["decode"], {"logits": [batch]}),
    )  # fmt: skip
    for where, ports, each in wanted:
        for name, shape in each.items():
            if name not in ports:
                raise ValueError(f"there is no {where} {name}")
            # Behind these stand sizes of the model, which the graph is held against.
            if shape is not None and ports[name].shape[: len(shape)] != shape:
                raise ValueError(f"{where} {name} has shape {ports[name].shape}, the sizes say {shape}")
    if extra := sorted(name for name in inputs["decode"] if name.startswith("slot.") and name not in slots):
        raise ValueError(f"input of decode {extra[0]} is of no segment")


def _by_name(program: str, ports: list[Port], kind: str) -> dict[str, Port]:
    named = {port.name: port for port in ports}
    if len(named) < len(ports):
        raise ValueError(f"program {program} has two {kind}s of one name")
    return named


def _check_caches(part: Manifest | Variant, whole: Manifest) -> None:
    """Every program's cache ports are those of the layers, as long as their segments."""
    model, batch = whole.model, part.geometry.batch
    for name, program in part.programs.items():
        for when, ports in (("past", program.inputs), ("present", program.outputs)):
            found = {port.name: port for port in ports if port.name.startswith((f"{when}_key.", f"{when}_value."))}
            # Counted first, so that a lie about layers costs nothing.
            if len(found) != 2 * model.layers and (name == "decode" or found):
                raise ValueError(f"program {name} has {len(found)} {when} caches, {model.layers} layers have two each")
            if not found:
                continue
            for segment in part.segments:
                shape = [batch, model.kv_heads, segment.capacity, model.head_dim]
                for layer in range(segment.first_layer, segment.last_layer):
                    for port in (f"{when}_key.{layer}", f"{when}_value.{layer}"):
                        if port not in found:
                            raise ValueError(f"program {name} has no {port}")
                        if (found[port].shape, found[port].dtype) != (shape, whole.dtype):
                            raise ValueError(
                                f"program {name}: {port} is {found[port].dtype}{found[port].shape}, its segment and "
                                f"the model say {whole.dtype}{shape}"
                            )


def _check_forecast(part: Manifest | Variant) -> None:
    from secateur.runtime.kv import buffer_bytes, port_bytes

    assert part.forecast is not None
    programs: Mapping[str, Program] = part.programs
    caches = sum(port_bytes(port) for port in programs["decode"].inputs if port.name.startswith("past_"))
    for name, told, is_so in (
        ("caches", part.forecast.caches, caches), ("buffers", part.forecast.buffers, buffer_bytes(programs)),
    ):  # fmt: skip
        if told != is_so:
            raise ValueError(f"forecast: {told} bytes of {name}, the ports say {is_so}")
