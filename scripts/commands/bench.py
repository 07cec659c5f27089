"""How fast the bundle is on this machine, beside the published way and other networks."""

import ctypes
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data.utils import dense_patch_slices
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from monai.metrics import compute_dice
from monai.networks import one_hot
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from scripts.commands.compare_recipes import RECIPES
from scripts.commands.phantom import phantom
from scripts.data.subjects import Subject, find_subjects, require_subjects, subjects_to_segment
from scripts.errors import InputError, require_true_or_false, require_whole_numbers
from scripts.files import ROOT, whole_files
from scripts.inference.precision import MixedPrecisionInferer, network_precision
from scripts.inference.windows import LargestWindowInferer
from scripts.machine import keep_freed_memory
from scripts.network import SkipDenseSeg
from scripts.results.tables import markdown_table
from scripts.training.optimizer import MuonAdamW
from scripts.weights import load_weights

PATCH = 64
PUBLISHED_STRIDE = 8
CUBES = (96, 128, 192, 256)
FEED_STEPS = 200
Row = dict[str, Any]


def networks() -> dict[str, nn.Module]:
    """Both published variants, and what MONAI offers for the same task: 2 channels in, 4 classes out.

    The compact variant is that of `configs/train.json`, without dropout; the paper's has its dropout. DynUNet has the
    layers and features that nnU-Net plans for a patch of 64 voxels, without its deep supervision.
    """
    training, recipes = (
        ConfigParser(ConfigParser.load_config_file(file)) for file in (ROOT / "configs" / "train.json", RECIPES)
    )
    return {
        "SkipDenseSeg compact": training.get_parsed_content("network_def"),
        "SkipDenseSeg paper": SkipDenseSeg(block_config=(4, 4, 4, 4), grouped_upsampling=True, bias=True),
        **{name: recipes.get_parsed_content(f"{name}#network_def") for name in ("DynUNet", "SegResNet", "UNet")},
    }


def default_allocator() -> None:
    """Undo `keep_freed_memory`: the thresholds at which glibc arrives by itself when large blocks come and go."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**26)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, what it started on a GPU included."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def interleaved_medians(
    ways: Mapping[str, tuple[Callable[[], None], Callable[[], Any]]], rounds: int, device: torch.device, title: str
) -> dict[str, float]:
    """Median seconds of each way, all ways in turn in each round, so that a slow minute of the machine meets all.

    Args:
        ways: by name, what sets up the allocator and what is timed, which was called before.
        rounds: how many.
        device: where the ways compute.
        title: for the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in tqdm([name for _ in range(rounds) for name in ways], desc=title, mininterval=1.0):
        prepare, call = ways[name]
        prepare()
        seconds[name].append(seconds_of(call, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """GB that a call needs at most beyond what was in use before; None where the system doesn't tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if platform.libc_ver()[0] != "glibc" or not reset.exists():
        return None

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])

    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts anew at what is in use
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) * 1024 / 1e9


def convolution_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the network's largest convolution, 32 to 32 features, by itself and in the better layout."""
    best = 0.0
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        convolution = nn.Conv3d(32, 32, 3, padding=1, bias=False).to(device, dtype).to(memory_format=layout)
        image = torch.randn(1, 32, PATCH, PATCH, PATCH, device=device, dtype=dtype).contiguous(memory_format=layout)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            convolution(image)
        with torch.inference_mode():
            seconds = [seconds_of(lambda c=convolution, i=image: c(i), device) for _ in range(10)]
        best = max(best, counter.get_total_flops() / statistics.median(seconds) / 1e9)
    return best


def _training_step(
    network: nn.Module,
    inferer: Inferer,
    batch_size: int,
    device: torch.device,
    optimizer_type: type[torch.optim.Optimizer],
) -> Callable[[], None]:
    optimizer = optimizer_type(network.parameters())
    image = torch.randn(batch_size, 2, PATCH, PATCH, PATCH, device=device)
    label = torch.randint(0, 4, (batch_size, PATCH, PATCH, PATCH), device=device)

    def step() -> None:
        network.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(inferer(image, network), label).backward()
        optimizer.step()

    return step


def training_steps(device: torch.device, precision: str, rounds: int, ceiling: float) -> list[Row]:
    """Seconds of a training step at batch 1 and 4: plain eager float32 against ours, and other networks as ours."""
    rows: list[Row] = []
    plain = SimpleInferer()
    tuned = MixedPrecisionInferer(SimpleInferer(), precision)
    for batch_size in (1, 4):
        ways, gigaflops = {}, {}
        for name, network in networks().items():
            network.to(device)
            optimizer_type = MuonAdamW if isinstance(network, SkipDenseSeg) else torch.optim.AdamW
            ways[name] = (keep_freed_memory, _training_step(network, tuned, batch_size, device, optimizer_type))
            ways[name][1]()
            without_optimizer = _training_step(network, tuned, batch_size, device, torch.optim.SGD)
            with FlopCounterMode(display=False) as counter:
                without_optimizer()
            gigaflops[name] = counter.get_total_flops() / 1e9
            if isinstance(network, SkipDenseSeg):
                step = _training_step(network, plain, batch_size, device, optimizer_type)
                step()
                ways[f"{name}, plain eager float32"] = (default_allocator, step)
        medians = interleaved_medians(ways, rounds, device, f"training steps, batch {batch_size}")
        for name, seconds in medians.items():
            row: Row = {"network": name, "batch": batch_size, "seconds": seconds}
            if name in gigaflops:
                row["share of the ceiling"] = gigaflops[name] / seconds / ceiling
            if slower := medians.get(f"{name}, plain eager float32"):
                row["times as fast as plain"] = slower / seconds
            rows.append(row)
    return rows


def _config(config_file: str, device: torch.device, precision: str, **settings: Any) -> ConfigParser:
    config = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / config_file))
    config.update({"bundle_root": str(ROOT), "device": device, "precision": precision, **settings})
    return config


def one_subject(
    device: torch.device, precision: str, rounds: int, ceiling: float, subject: Subject, published_in_full: bool
) -> list[Row]:
    """Seconds for one subject, network only, by the published way, by common windows and by ours, with its labels."""
    network = SkipDenseSeg().to(device)
    load_weights(network, str(ROOT / "models" / "model.pt"))
    network.eval()
    dense = SlidingWindowInferer([PATCH] * 3, 1, overlap=1 - PUBLISHED_STRIDE / PATCH)
    common = SlidingWindowInferer([PATCH] * 3, 1, overlap=0.5, mode="gaussian")
    # the published way, the common one over the whole volume, over the foreground, and ours
    whole = _config("inference.json", device, "fp32", foreground_margin=1000)
    ours = _config("inference.json", device, precision)
    in_windows = _config("inference.json", device, precision, window_size=[PATCH] * 3).get_parsed_content("inferer")
    volume = whole.get_parsed_content("preprocessing")(subject)
    box = ours.get_parsed_content("preprocessing")(subject)
    image, foreground = (item["image"][None].as_tensor().to(device) for item in (volume, box))
    window = image[..., :PATCH, :PATCH, :PATCH].contiguous()
    windows = len(dense_patch_slices(image.shape[2:], [PATCH] * 3, [PUBLISHED_STRIDE] * 3))
    our_inferer = ours.get_parsed_content("inferer")
    tuned_common = MixedPrecisionInferer(common, precision)

    @torch.inference_mode()
    def window_pass() -> None:
        network(window)

    @torch.inference_mode()
    def segment(inferer: Inferer, values: torch.Tensor, network: nn.Module = network) -> torch.Tensor:
        return inferer(values, network)

    published_way = f"the published way: {windows:,} windows at stride {PUBLISHED_STRIDE}, float32"
    common_way = f"{PATCH}^3 windows, overlap 0.5, whole volume, float32"
    calls: dict[str, tuple[Callable[[], Any], Any]] = {
        **({published_way: (lambda: segment(dense, image), whole)} if published_in_full else {}),
        common_way: (lambda: segment(common, image), whole),
        "the same over the foreground, our precision": (lambda: segment(tuned_common, foreground), ours),
        "ours": (lambda: segment(our_inferer, foreground), ours),
    }
    others = {name: net.to(device).eval() for name, net in networks().items() if not isinstance(net, SkipDenseSeg)}
    for name, other in others.items():
        calls[f"{name}, over the foreground as ours"] = (
            lambda other=other: segment(our_inferer, foreground, other),
            None,
        )
        # they normalise over all that they are given, so that one pass costs them Dice
        calls[f"{name}, the same in {PATCH}^3 windows, overlap {ours['inferer#inferer#inferer#overlap']}"] = (
            lambda other=other: segment(in_windows, foreground, other),
            None,
        )

    truth = one_hot(box["reference"][None].long(), 4)
    brain = box["t1"][0] > 0
    rows: dict[str, Row] = {}
    labels: dict[str, torch.Tensor] = {}
    for name, (call, config) in tqdm(calls.items(), desc="one subject, labels", mininterval=1.0):
        keep_freed_memory()
        logits: list[torch.Tensor] = []
        row = rows[name] = {"way": name}

        def once(call: Callable[[], Any] = call, logits: list[torch.Tensor] = logits, row: Row = row) -> None:
            row["seconds"] = seconds_of(lambda: logits.append(call()), device)

        row["peak GB"] = peak_memory(once, device)
        if config is not None:
            item = volume if config is whole else box
            found = config.get_parsed_content("postprocessing")(
                item | {"pred": type(item["image"])(logits[0][0].cpu())}
            )
            labels[name] = found["pred"]
            reference = next(iter(labels.values()))
            row["Dice"] = float(
                compute_dice(one_hot(found["pred"][None].long(), 4), truth, include_background=False).mean()
            )
            row["labels as the first"] = float((found["pred"] == reference)[0][brain].float().mean())
    ways = {name: (keep_freed_memory, call) for name, (call, config) in calls.items() if config is not whole}
    if not published_in_full:
        ways[published_way] = (keep_freed_memory, window_pass)
        rows = {published_way: {"way": f"{published_way} (one timed, multiplied)"}} | rows
    medians = interleaved_medians(ways, rounds, device, "one subject")
    if not published_in_full:
        medians[published_way] *= windows
    # long enough to be timed once, when all is warm; the published way in full is too long to be repeated at all
    medians[common_way] = seconds_of(calls[common_way][0], device)
    with FlopCounterMode(display=False) as counter:
        calls["ours"][0]()
    for name, row in rows.items():
        row["seconds"] = medians.get(name, row.get("seconds"))
        row["times as fast as published"] = rows[published_way]["seconds"] / row["seconds"]
    rows["ours"]["share of the ceiling"] = counter.get_total_flops() / medians["ours"] / 1e9 / ceiling
    return list(rows.values())


def growth(device: torch.device, precision: str, rounds: int) -> list[Row]:
    """Seconds and memory of ours over cubes, in one pass and in windows of 128^3."""
    network = SkipDenseSeg().to(device).eval()
    rows = []
    for side in CUBES:
        image = torch.randn(1, 2, side, side, side, device=device)
        for window_size in ("auto", [128, 128, 128]):
            if window_size != "auto" and side <= 128:
                continue
            inferer = MixedPrecisionInferer(
                LargestWindowInferer(window_size, sw_batch_size=1, overlap=0.25, mode="gaussian"), precision
            )

            @torch.inference_mode()
            def call(inferer: Inferer = inferer, image: torch.Tensor = image) -> torch.Tensor:
                return inferer(image, network)

            keep_freed_memory()
            memory = peak_memory(call, device)
            seconds = statistics.median(seconds_of(call, device) for _ in range(rounds if side < 192 else 1))
            rows.append(
                {
                    "volume": f"{side}^3",
                    "window_size": str(window_size),
                    "seconds": seconds,
                    "seconds a million voxels": seconds / side**3 * 1e6,
                    "peak GB": memory,
                }
            )
    return rows


def feed(device: torch.device, precision: str, dataset_dir: Path) -> list[Row]:
    """Batches of 4 patches a second that training is fed with, without a network, and the wait for them with one."""
    steps, batch_size = FEED_STEPS, 4
    config = _config(
        "train.json", device, precision, dataset_dir=str(dataset_dir), val_subjects=[], batch_size=batch_size,
        crops_per_epoch=steps * batch_size, patch_size=[PATCH] * 3, output_dir=str(dataset_dir.parent),
    )  # fmt: skip
    loader = config.get_parsed_content("train#dataloader")
    for _ in loader:  # processes start with the first batch
        break
    seconds = seconds_of(lambda: [None for _ in loader], device)
    keep_freed_memory()
    tuned = MixedPrecisionInferer(SimpleInferer(), precision)
    step = _training_step(config.get_parsed_content("network"), tuned, batch_size, device, MuonAdamW)
    batches = iter(loader)
    waits, computing = [], []
    for _ in range(min(6, steps)):
        waits.append(seconds_of(lambda: next(batches), device))
        computing.append(seconds_of(step, device))
    return [
        {
            "steps a second, feed alone": steps / seconds,
            "wait for data, s a step": statistics.median(waits[1:]),
            "training step, s": statistics.median(computing[1:]),
        }
    ]


def end_to_end(dataset_dir: Path, output_dir: Path, precision: str) -> list[Row]:
    """The documented command on all subjects of a folder, as a process."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", str(dataset_dir.resolve()), "--output_dir", str(output_dir.resolve())]
    command += ["--precision", precision]
    begin = time.perf_counter()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if finished.returncode:
        reason = (finished.stderr.strip() or "no word about it").splitlines()[-1]
        raise InputError(f"{dataset_dir}: segmenting ended with status {finished.returncode}: {reason}")
    told = re.search(r"time: ([\d.]+) s to start up, then ([\d.]+) s a subject, (.*)", finished.stdout)
    return [
        {
            "subjects": len(subjects_to_segment(str(dataset_dir), None)),
            "seconds": seconds,
            "start-up, s": float(told[1]),
            "seconds a subject": float(told[2]),
            "of these": told[3],
            "peak GB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
        }
    ]


def labeled_subject(dataset_dir: str) -> Subject:
    """The first subject of a folder that has a label; InputError where none has one, or as `find_subjects`."""
    labeled = [subject for subject in find_subjects(dataset_dir) if "label" in subject]
    require_subjects(labeled, dataset_dir, "measure")
    return labeled[0]


def bench(
    output_dir: str = "eval/bench",
    rounds: int = 3,
    subjects: int = 13,
    precision: str = "auto",
    dataset_dir: str | None = None,
    published_in_full: bool = False,
) -> None:
    """Measure this machine: training steps, one subject, growth with volume, the feed and a folder of subjects.

    Prints tables and writes `bench.md` and `bench.json`. Takes 9 minutes on 2 cores with bfloat16, longer
    without; run nothing else meanwhile.

    Args:
        output_dir: where results go; phantom subjects are made in `subjects/` below it and kept.
        rounds: how often each way is timed; the median counts.
        subjects: unlabelled subjects that are segmented end to end.
        precision: of ours: auto, fp32, bf16 or fp16.
        dataset_dir: whose first labelled subject is segmented in each way; a phantom is, if not given.
        published_in_full: whether it is segmented the published way too, for its Dice and labels: half an hour to an
            hour more on 2 cores. Otherwise one of the windows is timed.

    Raises:
        InputError: a setting can't be, `dataset_dir` has no labelled subject, or segmenting the folder fails.
    """
    require_whole_numbers(1, rounds=rounds, subjects=subjects)
    require_true_or_false(published_in_full=published_in_full)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = network_precision(device, precision)
    torch.manual_seed(0)
    output = Path(output_dir)
    phantoms = output / "subjects"
    subject = None if dataset_dir is None else labeled_subject(dataset_dir)
    phantom(str(phantoms), subjects=1, unlabeled=subjects, seed=5)
    subject = subject or labeled_subject(str(phantoms))

    keep_freed_memory()
    training_dtype = network_precision(device, precision, training=True)
    ceiling, training_ceiling = (convolution_ceiling(device, each) for each in (dtype, training_dtype))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.cpu.get_capabilities()["cpu_name"]
    machine: Row = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": str(dtype).removeprefix("torch."),
        "precision in training": str(training_dtype).removeprefix("torch."),
        "convolution ceiling, GFLOP/s": ceiling,
        "that of the precision in training": training_ceiling,
    }
    results = {
        "machine": [machine],
        f"training step, patch of {PATCH}^3": training_steps(device, precision, rounds, training_ceiling),
        "one subject, network only": one_subject(device, precision, rounds, ceiling, subject, published_in_full),
        "growth with volume": growth(device, precision, rounds),
        "training feed, batch 4": feed(device, precision, phantoms),
        "a folder of subjects, end to end": end_to_end(phantoms, output / "labels", precision),
    }
    tables = "\n\n".join(f"### {title}\n\n{markdown_table(rows)}" for title, rows in results.items())
    with whole_files(output) as temporary:
        (temporary / "bench.json").write_text(json.dumps(results, indent=2) + "\n")
        (temporary / "bench.md").write_text(tables + "\n")
    print(f"{tables}\n\nwritten to {output}/bench.md and bench.json")
