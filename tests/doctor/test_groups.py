"""What groups make of a machine, on machines that are not here; and what they leave behind."""

from __future__ import annotations

import os

import mlx.core as mx
import numpy as np
import pytest

from qwen_image_mlx.doctor import block, chip, disk, env, faults, fits, measure, rates, vae
from qwen_image_mlx.doctor.__main__ import peak_bytes
from qwen_image_mlx.doctor.outcome import Outcome
from qwen_image_mlx.models.qwen_image.config import TransformerConfig
from qwen_image_mlx.runtime import memory_plan
from qwen_image_mlx.runtime.memory_plan import Work

SAID = {
    ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M5",
    ("sysctl", "-n", "hw.memsize"): str(16 << 30),
    ("sysctl", "-n", "sysctl.proc_translated"): "0",
    ("sysctl", "-n", "vm.swapusage"): "total = 3072.00M  used = 2048.00M  free = 1024.00M  (encrypted)",
    ("ioreg", "-rc", "AGXAccelerator", "-d", "1"): '  |   "gpu-core-count" = 10\n',
    ("pmset", "-g"): " lowpowermode         1\n",
    ("pmset", "-g", "batt"): "Now drawing from 'Battery Power'\n",
}  # fmt: skip


@pytest.fixture
def m5(monkeypatch):
    """An M5 with macOS 26.3 on battery, in low-power mode, swapping."""

    def said(*command):
        return SAID.get(command, "")

    for module in (chip, env):
        monkeypatch.setattr(module, "output_of", said)
    monkeypatch.setattr(chip.platform, "mac_ver", lambda: ("26.3", ("", "", ""), "arm64"))
    for module in (chip, env):
        monkeypatch.setattr(module, "architecture", lambda: "applegpu_g17s")
    chip.uses_neural_accelerators.cache_clear()
    yield monkeypatch
    chip.uses_neural_accelerators.cache_clear()


def judged(machine, free=1 << 40):
    outcome = Outcome()
    env._judge(outcome, machine, env._mlx(), free)
    return [found.sentence for found in outcome.findings]


def test_a_mac_is_described(m5):
    machine = env._mac()
    assert machine["chip"] == "Apple M5"
    assert machine["memory_bytes"] == 16 << 30
    assert machine["swap_bytes"] == 2 << 30
    assert machine["gpu_cores"] == 10
    assert (machine["rosetta"], machine["low_power"], machine["on_battery"]) == (False, True, True)


def test_free_memory_is_what_plans_are_made_with(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "free_memory", lambda: 123)
    assert env.run({"folder": str(tmp_path)}).figures["machine"]["free_memory_bytes"] == 123


@pytest.mark.slow
@pytest.mark.parametrize(("gib", "recommended", "forms"), [
    (8, 5.73, ("streamed", "streamed once saved quantized", "streamed once saved quantized")),
    (16, 11.45, ("streamed", "streamed once saved quantized", "staged")),
    (64, 51.54, ("resident", "resident", "resident")),
])  # fmt: skip
def test_what_fits_a_mac_is_what_can_run_there(tmp_path, monkeypatch, gib, recommended, forms):
    """Layers that are read at each pass are not quantized: only a saved pack is streamed."""
    info = {
        "memory_size": gib << 30, "max_recommended_working_set_size": int(recommended * 1e9),
        "max_buffer_length": gib << 29,
    }  # fmt: skip
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device=None: info)
    monkeypatch.setattr(memory_plan, "backend", lambda: "gpu")
    outcome = fits.run({"folder": str(tmp_path)})
    plans = outcome.figures["plans"]
    assert tuple(plans[name]["fits"] for name in ("bf16", "8 bits", "4 bits")) == forms
    assert outcome.summary.endswith(f"as planned: bf16 {forms[0]}; 8 bits {forms[1]}; 4 bits {forms[2]}")


@pytest.mark.slow
def test_what_fits_nowhere_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "usable_memory", lambda: 1 << 30)
    assert {plan["fits"] for plan in fits.run({"folder": str(tmp_path)}).figures["plans"].values()} == {"too large"}


def test_warnings_of_a_mac(m5):
    m5.setattr(chip, "wheel_tags", lambda: ["py3-none-macosx_26_0_arm64"])
    m5.delenv("MLX_ENABLE_TF32", raising=False)
    said = " | ".join(judged(env._mac(), free=1 << 30))
    for words in ("TF32", "2.1 GB are swapped out", "low-power mode", "on battery", "1.1 GB are free"):
        assert words in said
    m5.setenv("MLX_ENABLE_TF32", "0")
    assert "TF32" not in " ".join(judged(env._mac()))


@pytest.mark.parametrize(
    ("system", "tag", "used"), [("26.3", "14", False), ("26.1", "26", False), ("26.2", "26", True)]
)
def test_neural_accelerators_need_a_new_macos_and_its_wheel(m5, system, tag, used):
    m5.setattr(chip.platform, "mac_ver", lambda: (system, ("", "", ""), "arm64"))
    for module in (chip, env):
        m5.setattr(module, "wheel_tags", lambda: [f"py3-none-macosx_{tag}_0_arm64"])
    m5.delenv("MLX_ENABLE_TF32", raising=False)
    assert any("neural accelerators" in sentence for sentence in judged({})) is not used
    assert chip.coarse_fp32() is used


def test_missing_tools_leave_figures_out(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert chip.output_of("sysctl", "-n", "hw.memsize") == ""
    machine = env._mac()
    assert machine["memory_bytes"] == 0
    assert "swap_bytes" not in machine
    assert judged(machine) == []


def test_a_rosetta_python_is_told():
    assert "Rosetta" in judged({"rosetta": True})[0]


def test_what_a_chip_can_do(m5):
    assert chip.nominal_tflops() == pytest.approx(12.5)


def test_a_pass_of_the_released_transformer():
    """72 TFLOP at 1024x1024 without guidance; other traffic is a few per cent where it is fast."""
    flop = dict.fromkeys(("gemm_bf16_gflops", "gemm_bf16_deep_gflops", "attention_gflops"), 1000.0)
    assert rates.pass_seconds(TransformerConfig(), 4096, {**flop, "copy_gbs": 1e9}) == pytest.approx(72.0, rel=0.01)
    traffic = rates.pass_seconds(TransformerConfig(), 4096, {**dict.fromkeys(flop, 1e12), "copy_gbs": 61.0})
    assert traffic == pytest.approx(1.0, rel=0.05)  # 61 GB a pass


@pytest.mark.parametrize(("seconds", "words"), [
    (9.64, "9.6 s"), (0.25, "0.25 s"), (77.2, "77 s"), (600, "10 min"), (40_000, "11.1 h"),
])  # fmt: skip
def test_durations_in_words(seconds, words):
    assert rates.duration(seconds) == words


def test_rates_far_below_the_chip_are_slow(monkeypatch):
    for nominal, verdicts in ((10.0, ["slow"]), (2.0, [])):
        outcome = Outcome("", {"gemm_bf16_gflops": 1500.0, "gemm_fp32_gflops": 1.0})
        monkeypatch.setattr(rates, "on_metal", lambda: True)
        monkeypatch.setattr(rates, "nominal_tflops", lambda: nominal)  # noqa: B023
        rates._judge(outcome)
        assert [found.verdict for found in outcome.findings] == verdicts


def test_a_slow_blas_is_told():
    outcome = Outcome("", {"gemm_bf16_gflops": 3.0, "gemm_fp32_gflops": 1.3})
    rates._judge(outcome)
    assert "preload OpenBLAS" in outcome.summary
    assert outcome.findings == []


def test_the_disk_s_file_is_read_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_CPU_SIZE", 2 * disk._CHUNK)
    outcome = disk.run({"folder": str(tmp_path)})
    assert outcome.figures["size_bytes"] == 32 << 20
    assert outcome.figures["read_gbs"] > 0
    assert outcome.findings == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_other_bytes_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_CPU_SIZE", 2 * disk._CHUNK)
    write = disk.write

    def spoiled(path, size):
        write(path, size)
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")

    monkeypatch.setattr(disk, "write", spoiled)
    assert [found.verdict for found in disk.run({"folder": str(tmp_path)}).findings] == ["wrong"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_slow_is_told_on_a_mac(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_CPU_SIZE", disk._CHUNK)
    monkeypatch.setattr(disk, "_SLOW", 1e6)
    monkeypatch.setattr(disk, "on_metal", lambda: True)
    assert [found.verdict for found in disk.run({"folder": str(tmp_path)}).findings] == ["slow"]


def test_a_full_disk_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_SPARE", 1 << 60)
    assert [found.verdict for found in disk.run({"folder": str(tmp_path)}).findings] == ["odd"]


def test_streamed_bytes_are_those_of_the_readme():
    assert disk.streamed_bytes() / 1e9 == pytest.approx(27.0, abs=0.05)


@pytest.mark.slow
def test_cancelling_takes_a_few_blocks():
    block_s, latency = faults.cancel_chain()
    assert 0 < latency < faults._MAX_BLOCKS * block_s + 0.5


def test_arrays_across_threads():
    assert faults.across_threads(lazy=False) == "works"
    assert faults.across_threads(lazy=True) != "gives wrong numbers"


def test_a_plan_that_is_too_low_is_odd():
    outcome = Outcome()
    figures = {"peak_bytes": 3e9, "plan_bytes": 2e9, "plan_ratio": 1.5}
    measure.judge_memory(outcome, {"guided": figures, "plain": {**figures, "plan_ratio": 1.0}})
    assert [found.sentence.split(";")[0] for found in outcome.findings] == [
        "guided takes 3.00 GB, but the memory plan predicts 2.00 GB"
    ]


def test_peaks_are_measured(monkeypatch):
    """And the highest is kept, which a process's report names where a GPU's buffers do not count as resident."""
    before = mx.ones(1000)
    mx.eval(before)
    assert measure.peak_of(lambda: mx.eval(mx.full((1 << 20,), 1.0))) >= 4 << 20
    measure.peak_of(lambda: None)
    assert mx.get_peak_memory() < 4 << 20 <= measure.highest_peak()
    monkeypatch.setattr(measure, "_highest", 1 << 50)
    assert peak_bytes() == 1 << 50


def test_plans_of_other_widths(tmp_path):
    """The plan is asked, not repeated: a wider transformer takes more."""
    work = Work(width=256, height=256, steps=1, guided=False)
    narrow = measure.plan_bytes(tmp_path / "narrow", "denoise", work, block.width())
    assert narrow < measure.plan_bytes(tmp_path / "wide", "denoise", work)


@pytest.mark.slow
def test_the_decoder_runs_with_winograd_and_without(tmp_path, monkeypatch):
    said = []
    decode = vae.decode
    monkeypatch.setattr(vae, "_CPU_SIDE", 32)
    monkeypatch.setattr(vae, "on_metal", lambda: True)

    def listened(*arguments, **options):
        said.append(os.environ.get(vae._WINOGRAD))
        return decode(*arguments, **options)

    monkeypatch.setattr(vae, "decode", listened)
    monkeypatch.delenv(vae._WINOGRAD, raising=False)
    outcome = vae.run({"folder": str(tmp_path)})
    assert said == [None, None, "0", "0"]
    assert vae._WINOGRAD not in os.environ
    for figures in outcome.figures.values():
        assert figures["peak_bytes"] > 0
        assert np.isfinite(figures["plan_ratio"])


def test_a_refused_allocation(monkeypatch):
    """On Metal an array of twice the largest buffer is asked for; elsewhere nothing is."""
    assert faults.allocate_too_much().startswith("not tried")
    asked = []

    def refuse(array):
        asked.append(array.nbytes)
        raise RuntimeError("[metal::malloc] Attempting to allocate 2048 bytes")

    monkeypatch.setattr(faults, "on_metal", lambda: True)
    monkeypatch.setattr(faults, "device_info", lambda: {"max_buffer_length": 1 << 33})
    monkeypatch.setattr(faults, "finish", refuse)
    assert faults.allocate_too_much() == "refused"
    assert asked == [1 << 34]
    monkeypatch.setattr(faults, "finish", lambda array: None)
    assert faults.allocate_too_much() == "not refused"
