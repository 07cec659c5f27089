"""`python -m scripts bench`: speed of the bundle on this machine, beside the published way and other networks."""

import ctypes
import json
import platform
import re
import resource
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data.utils import dense_patch_slices
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from torch import nn
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from scripts.commands.compare_recipes import RECIPES
from scripts.commands.phantom import phantom
from scripts.commands.shared import CONFIGS, bundle_command
from scripts.data.subjects import Subject, SubjectFolder
from scripts.errors import InputError, require_true_or_false, require_whole_numbers
from scripts.files import ROOT, whole_files
from scripts.inference.precision import MixedPrecisionInferer, network_precision
from scripts.inference.windows import LargestWindowInferer
from scripts.machine import keep_freed_memory
from scripts.network import SkipDenseSeg
from scripts.results.metrics import tissue_dice
from scripts.results.tables import markdown_table
from scripts.training.optimizer import MuonAdamW
from scripts.weights import load_weights

PATCH = 64
PUBLISHED_STRIDE = 8
CUBES = (96, 128, 192, 256)
FEED_STEPS = 200
Row = dict[str, Any]


def networks() -> dict[str, nn.Module]:
    """Return both published variants, and MONAI's networks for the same task: 2 channels in, 4 classes out.

    The compact variant is that of `configs/train.json`, without dropout; the paper's variant has dropout. DynUNet has
    the layers and features that nnU-Net plans for a patch of 64 voxels, without deep supervision.
    """
    training, recipes = (
        ConfigParser(ConfigParser.load_config_file(file)) for file in (CONFIGS / "train.json", RECIPES)
    )
    return {
        "SkipDenseSeg compact": training.get_parsed_content("network_def"),
        "SkipDenseSeg paper": SkipDenseSeg(block_config=(4, 4, 4, 4), grouped_upsampling=True, bias=True),
        **{name: recipes.get_parsed_content(f"{name}#network_def") for name in ("DynUNet", "SegResNet", "UNet")},
    }


def default_allocator() -> None:
    """Undo `keep_freed_memory`: set the thresholds that glibc reaches by itself when large blocks come and go."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**26)


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the wall time of one call, including the work that it starts on a GPU."""
    begin = timer()
    call()
    return timer() - begin


def interleaved_medians(
    ways: Mapping[str, tuple[Callable[[], None], Callable[[], Any]]], rounds: int, title: str
) -> dict[str, float]:
    """Return the median seconds of each way; each round times all ways, so that a slow minute affects all of them.

    Args:
        ways: by name, a function that sets up the allocator and the function to time, which is already warm.
        rounds: number of rounds.
        title: for the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in tqdm([name for _ in range(rounds) for name in ways], desc=title, mininterval=1.0):
        prepare, call = ways[name]
        prepare()
        seconds[name].append(seconds_of(call))
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """Return the peak GB of a call beyond the memory in use before; None where the system doesn't report it."""
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
    reset.write_text("5")  # resets the peak to the memory in use
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) * 1024 / 1e9


def gigaflops_of(call: Callable[[], Any]) -> float:
    """Return the number of floating-point operations of a call, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def infer(inferer: Inferer, image: torch.Tensor, network: nn.Module) -> torch.Tensor:
    """Return the logits of an image (B, C, X, Y, Z), without gradients."""
    return inferer(image, network)


def convolution_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the GFLOP/s of the network's largest convolution, 32 to 32 features, alone and in the faster layout."""
    best = 0.0
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        convolution = nn.Conv3d(32, 32, 3, padding=1, bias=False).to(device, dtype).to(memory_format=layout)
        image = torch.randn(1, 32, PATCH, PATCH, PATCH, device=device, dtype=dtype).contiguous(memory_format=layout)
        with torch.inference_mode():
            gigaflops = gigaflops_of(lambda c=convolution, i=image: c(i))
            seconds = [seconds_of(lambda c=convolution, i=image: c(i)) for _ in range(10)]
        best = max(best, gigaflops / statistics.median(seconds))
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
    """Time training steps at batch 1 and 4: ours, plain eager float32, and other networks trained like ours."""
    rows: list[Row] = []
    tuned = MixedPrecisionInferer(SimpleInferer(), precision)
    for batch_size in (1, 4):
        ways, gigaflops = {}, {}
        for name, network in networks().items():
            network.to(device)
            optimizer_type = MuonAdamW if isinstance(network, SkipDenseSeg) else torch.optim.AdamW
            ways[name] = (keep_freed_memory, _training_step(network, tuned, batch_size, device, optimizer_type))
            ways[name][1]()
            # SGD: the operations of the optimizer don't count
            gigaflops[name] = gigaflops_of(_training_step(network, tuned, batch_size, device, torch.optim.SGD))
            if isinstance(network, SkipDenseSeg):
                step = _training_step(network, SimpleInferer(), batch_size, device, optimizer_type)
                step()
                ways[f"{name}, plain eager float32"] = (default_allocator, step)
        medians = interleaved_medians(ways, rounds, f"training steps, batch {batch_size}")
        for name, seconds in medians.items():
            row: Row = {"network": name, "batch": batch_size, "seconds": seconds}
            if name in gigaflops:
                row["share of the ceiling"] = gigaflops[name] / seconds / ceiling
            if plain_seconds := medians.get(f"{name}, plain eager float32"):
                row["times as fast as plain"] = plain_seconds / seconds
            rows.append(row)
    return rows


def _config(config_file: str, device: torch.device, precision: str, **settings: Any) -> ConfigParser:
    config = ConfigParser(ConfigParser.load_config_file(CONFIGS / config_file))
    config.update({"bundle_root": str(ROOT), "device": device, "precision": precision, **settings})
    return config


def one_subject(
    device: torch.device, precision: str, rounds: int, ceiling: float, subject: Subject, published_in_full: bool
) -> list[Row]:
    """Time the network on one subject in several ways, and compare the labels.

    The ways are the published one, usual windows over the whole volume and over the foreground, ours, and other
    networks.
    """
    network = SkipDenseSeg().to(device)
    load_weights(network, str(ROOT / "models" / "model.pt"))
    network.eval()
    dense = SlidingWindowInferer([PATCH] * 3, 1, overlap=1 - PUBLISHED_STRIDE / PATCH)
    usual = SlidingWindowInferer([PATCH] * 3, 1, overlap=0.5, mode="gaussian")
    whole = _config("inference.json", device, "fp32", foreground_margin=1000)  # the whole volume
    ours = _config("inference.json", device, precision)
    windowed = _config("inference.json", device, precision, window_size=[PATCH] * 3)
    our_inferer, in_windows = (config.get_parsed_content("inferer") for config in (ours, windowed))
    volume, box = (config.get_parsed_content("preprocessing")(subject) for config in (whole, ours))
    image, foreground = (item["image"][None].as_tensor().to(device) for item in (volume, box))
    window = image[..., :PATCH, :PATCH, :PATCH].contiguous()
    windows = len(dense_patch_slices(image.shape[2:], [PATCH] * 3, [PUBLISHED_STRIDE] * 3))

    published_way = f"the published way: {windows:,} windows at stride {PUBLISHED_STRIDE}, float32"
    usual_way = f"{PATCH}^3 windows, overlap 0.5, whole volume, float32"
    # what is timed, and the config whose labels are compared
    calls: dict[str, tuple[Callable[[], torch.Tensor], ConfigParser | None]] = {
        **({published_way: (lambda: infer(dense, image, network), whole)} if published_in_full else {}),
        usual_way: (lambda: infer(usual, image, network), whole),
        "the same over the foreground, our precision": (
            lambda: infer(MixedPrecisionInferer(usual, precision), foreground, network),
            ours,
        ),
        "ours": (lambda: infer(our_inferer, foreground, network), ours),
    }
    for name, other in networks().items():
        if isinstance(other, SkipDenseSeg):
            continue
        other.to(device).eval()
        # these networks normalise over their whole input, so one pass costs them Dice: timed in windows as well
        overlap = windowed["inferer#inferer#inferer#overlap"]
        for way, inferer in (
            ("over the foreground as ours", our_inferer),
            (f"the same in {PATCH}^3 windows, overlap {overlap}", in_windows),
        ):
            calls[f"{name}, {way}"] = (lambda i=inferer, n=other: infer(i, foreground, n), None)

    brain = box["t1"][0] > 0
    rows: dict[str, Row] = {}
    labels: dict[str, torch.Tensor] = {}
    for name, (call, config) in tqdm(calls.items(), desc="one subject, labels", mininterval=1.0):
        keep_freed_memory()
        logits: list[torch.Tensor] = []
        row = rows[name] = {"way": name}

        def once(call: Callable[[], Any] = call, logits: list[torch.Tensor] = logits, row: Row = row) -> None:
            row["seconds"] = seconds_of(lambda: logits.append(call()))

        row["peak GB"] = peak_memory(once, device)
        if config is not None:
            item = volume if config is whole else box
            item = item | {"pred": type(item["image"])(logits[0][0].cpu())}
            labels[name] = config.get_parsed_content("postprocessing")(item)["pred"]
            row["Dice"] = tissue_dice(labels[name], box["reference"])["mean"]
            first = next(iter(labels.values()))
            row["labels as the first"] = float((labels[name] == first)[0][brain].float().mean())
    ways = {name: (keep_freed_memory, call) for name, (call, config) in calls.items() if config is not whole}
    if not published_in_full:
        ways[published_way] = (keep_freed_memory, lambda: infer(SimpleInferer(), window, network))
        rows = {published_way: {"way": f"{published_way} (one timed, multiplied)"}} | rows
    medians = interleaved_medians(ways, rounds, "one subject")
    if not published_in_full:
        medians[published_way] *= windows
    # too long for several rounds; timed once more now that everything is warm, but not the published way in full
    medians[usual_way] = seconds_of(calls[usual_way][0])
    for name, row in rows.items():
        row["seconds"] = medians.get(name, row.get("seconds"))
        row["times as fast as published"] = rows[published_way]["seconds"] / row["seconds"]
    rows["ours"]["share of the ceiling"] = gigaflops_of(calls["ours"][0]) / medians["ours"] / ceiling
    return list(rows.values())


def growth(device: torch.device, precision: str, rounds: int) -> list[Row]:
    """Measure time and memory of ours on cubes, in one pass and in windows of 128^3."""
    network = SkipDenseSeg().to(device).eval()
    rows = []
    for side in CUBES:
        image = torch.randn(1, 2, side, side, side, device=device)
        for window_size in ("auto", [128, 128, 128]) if side > 128 else ("auto",):
            windows = LargestWindowInferer(window_size, sw_batch_size=1, overlap=0.25, mode="gaussian")
            inferer = MixedPrecisionInferer(windows, precision)

            def call(inferer: Inferer = inferer, image: torch.Tensor = image) -> torch.Tensor:
                return infer(inferer, image, network)

            keep_freed_memory()
            memory = peak_memory(call, device)
            seconds = statistics.median(seconds_of(call) for _ in range(rounds if side < 192 else 1))
            rows.append(
                {
                    "volume": f"{side}^3",
                    "window_size": str(window_size),
                    "seconds": seconds,
                    "seconds per million voxels": seconds / side**3 * 1e6,
                    "peak GB": memory,
                }
            )
    return rows


def feed(device: torch.device, precision: str, dataset_dir: Path) -> list[Row]:
    """Measure the training data loader: batches of 4 patches per second alone, and the wait for data in training."""
    batch_size = 4
    config = _config(
        "train.json", device, precision, dataset_dir=str(dataset_dir), val_subjects=[], batch_size=batch_size,
        crops_per_epoch=FEED_STEPS * batch_size, patch_size=[PATCH] * 3, output_dir=str(dataset_dir.parent),
    )  # fmt: skip
    loader = config.get_parsed_content("train#dataloader")
    next(iter(loader))  # starts the worker processes
    seconds = seconds_of(lambda: [None for _ in loader])
    keep_freed_memory()
    tuned = MixedPrecisionInferer(SimpleInferer(), precision)
    step = _training_step(config.get_parsed_content("network"), tuned, batch_size, device, MuonAdamW)
    batches = iter(loader)
    waits, steps = [], []
    for _ in range(min(6, FEED_STEPS)):
        waits.append(seconds_of(lambda: next(batches)))
        steps.append(seconds_of(step))
    return [
        {
            "steps per second, feed alone": FEED_STEPS / seconds,
            "wait for data, s per step": statistics.median(waits[1:]),
            "training step, s": statistics.median(steps[1:]),
        }
    ]


def end_to_end(dataset_dir: Path, output_dir: Path, precision: str) -> list[Row]:
    """Time the documented command on all subjects of a folder, as a process."""
    settings = {"dataset_dir": str(dataset_dir.resolve()), "output_dir": str(output_dir.resolve())}
    command = bundle_command([str(CONFIGS / "inference.json")], settings | {"precision": precision})
    begin = timer()
    finished = subprocess.run(command, capture_output=True, text=True)
    seconds = timer() - begin
    if finished.returncode:
        reason = (finished.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"{dataset_dir}: segmenting ended with status {finished.returncode}: {reason}")
    times = re.search(r"time: ([\d.]+) s to start up, then ([\d.]+) s \w+ subject, (.*)", finished.stdout)
    return [
        {
            "subjects": len(SubjectFolder(str(dataset_dir)).to_segment()),
            "seconds": seconds,
            "start-up, s": float(times[1]),
            "seconds per subject": float(times[2]),
            "of which": times[3],
            "peak GB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
        }
    ]


def labeled_subject(dataset_dir: str) -> Subject:
    """Return the first labelled subject of a folder; raise InputError if there is none, or as `SubjectFolder`."""
    dataset = SubjectFolder(dataset_dir)
    labeled = [subject for subject in dataset.require_good() if "label" in subject]
    dataset.require(labeled, "measure")
    return labeled[0]


def bench(
    output_dir: str = "eval/bench",
    rounds: int = 3,
    subjects: int = 13,
    precision: str = "auto",
    dataset_dir: str | None = None,
    published_in_full: bool = False,
) -> None:
    """Measure training steps, one subject, growth with volume, data loading and a folder of subjects on this machine.

    Prints tables and writes `bench.md` and `bench.json`. Takes 9 minutes on 2 cores with bfloat16, longer without. Run
    nothing else meanwhile.

    Args:
        output_dir: where results go; phantom subjects are written to `subjects/` below it and kept.
        rounds: how often each way is timed; the median counts.
        subjects: number of unlabelled subjects to segment end to end.
        precision: of ours: auto, fp32, bf16 or fp16.
        dataset_dir: folder whose first labelled subject is segmented in each way; a phantom by default.
        published_in_full: whether to segment it in the published way too, for its Dice and labels; this takes another
            30 to 60 minutes on 2 cores. By default only one of the windows is timed.

    Raises:
        InputError: a setting is out of range, `dataset_dir` has no labelled subject, or segmenting the folder fails.
    """
    require_whole_numbers(1, rounds=rounds, subjects=subjects)
    require_true_or_false(published_in_full=published_in_full)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [network_precision(device, precision, training=training) for training in (False, True)]
    torch.manual_seed(0)
    output = Path(output_dir)
    phantoms = output / "subjects"
    subject = None if dataset_dir is None else labeled_subject(dataset_dir)
    phantom(str(phantoms), subjects=1, unlabeled=subjects, seed=5)
    subject = subject or labeled_subject(str(phantoms))

    keep_freed_memory()
    ceiling, training_ceiling = (convolution_ceiling(device, dtype) for dtype in dtypes)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.cpu.get_capabilities()["cpu_name"]
    machine: Row = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": str(dtypes[0]).removeprefix("torch."),
        "precision in training": str(dtypes[1]).removeprefix("torch."),
        "convolution ceiling, GFLOP/s": ceiling,
        "ceiling in training precision": training_ceiling,
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
