"""One resumable training loop for every stage: optimiser, schedule, checkpoint, curve."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Steps, peak learning rate, warm-up steps; cosine down to a twentieth. Times in steps."""

    steps: int
    rate: float
    warmup: int = 150
    weight_decay: float = 0.03
    log_every: int = 50
    save_every: int = 100

    def rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def run_stage(
    name: str,
    modules: dict[str, torch.nn.Module],
    parameters: Iterable[torch.nn.Parameter],
    measure_loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    validate: Callable[[], dict[str, float]],
    schedule: Schedule,
    folder: Path,
) -> list[dict]:
    """Runs or resumes a stage and returns its curve.

    `measure_loss(step)` must depend on nothing but the step and the weights, so that a resumed run goes on
    as the interrupted one would have. `<folder>/<name>.pt` holds modules, optimiser, step and curve.
    """
    path = folder / f"{name}.pt"
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.95))
    curve: list[dict] = []
    first, elapsed = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=False)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimiser.load_state_dict(state["optimiser"])
        first, elapsed, curve = state["step"], state["seconds"], state["curve"]
        log.info("%s: resuming at step %d", name, first)
    started = time.monotonic() - elapsed

    def save(step: int) -> None:
        state = {
            "modules": {key: module.state_dict() for key, module in modules.items()},
            "optimiser": optimiser.state_dict(),
            "step": step,
            "seconds": time.monotonic() - started,
            "curve": curve,
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        (folder / f"{name}.json").write_text(json.dumps(curve, indent=1))

    for step in range(first, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step)
        loss, figures = measure_loss(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        done = step + 1
        if done % schedule.log_every == 0 or done == schedule.steps:
            row = {"stage": name, "step": done, "seconds": round(time.monotonic() - started, 1), **figures}
            row["loss"] = round(float(loss.detach()), 4)
            if done % schedule.save_every == 0 or done == schedule.steps:
                row |= {f"val_{key}": value for key, value in validate().items()}
            curve.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
            log.info("%s", curve[-1])
        if done % schedule.save_every == 0 or done == schedule.steps:
            save(done)
    return curve
