"""The score kernels on a GPU: the bench's cases, small, against float64, and what is compiled ahead of time, loaded."""

from __future__ import annotations

import pytest
import torch

from secateur.tools.bench import kernels

pytestmark = pytest.mark.device


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch sees")


def test_every_kernel_computes_what_float64_does() -> None:
    for case in kernels.list_cases(small=True):
        limit = 0.0 if case.error is kernels._picks else 1e-5
        assert case.error(case.kernel(), case.exact()) <= limit, f"{case.name} {case.shape}"


def test_the_table_is_made_and_written(tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    kernels.main(["--small", "--out", str(out)])
    assert '"rows"' in out.read_text()


def test_what_is_compiled_ahead_of_time_runs_with_the_parameters_a_plugin_passes() -> None:
    """By the driver, as TensorRT launches it: pointers of inputs and outputs, and nothing else."""
    import ctypes

    from cuda.bindings import driver

    from secateur.exporters.plugins.aot import ARCHITECTURES, compile_launch
    from secateur.exporters.plugins.table import PLUGINS

    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in ARCHITECTURES:
        pytest.skip(f"no kernels for architecture {major}{minor}")
    score = torch.randn(1, 300, device="cuda")
    keep = torch.zeros(1, 30, dtype=torch.int32, device="cuda")
    launch = PLUGINS["RankTake"].launch([(1, 300)], ["fp32"], {"k": 30})
    made = compile_launch(launch, 10 * major + minor)
    torch.cuda.synchronize()
    error, module = driver.cuModuleLoadData(made.ptx.encode())
    assert error == driver.CUresult.CUDA_SUCCESS
    error, function = driver.cuModuleGetFunction(module, made.name.encode())
    assert error == driver.CUresult.CUDA_SUCCESS
    values = (score.data_ptr(), keep.data_ptr())
    passed = (values, (ctypes.c_void_p, ctypes.c_void_p))
    (error,) = driver.cuLaunchKernel(function, *launch.grid, made.threads, 1, 1, made.shared, 0, passed, 0)
    assert error == driver.CUresult.CUDA_SUCCESS
    torch.cuda.synchronize()
    assert torch.equal(keep[0].long(), score[0].topk(30).indices.sort().values)
