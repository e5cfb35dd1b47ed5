"""Each test proves a claim of the README on real parts: real training, real offline W&B runs, real processes.

No network, no MNIST: the digits are scikit-learn's, and the web servers are on 127.0.0.1.
"""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import pickle
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from torchvision.datasets import MNIST

import train
from train import Digits, DigitClassifier, DigitsDataModule, ImagePredictionLogger, UserError, main

SCRIPT = Path(train.__file__)
DIGITS = ["--dataset", "digits", "--accelerator", "cpu"]
DDP = [*DIGITS, "--devices", "2", "--strategy", "ddp"]
WANDB = str(Path(sys.executable).with_name("wandb"))


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working folder, and W&B offline: whoever runs the tests may have an account."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield
    assert wandb.run is None
    wandb.teardown()  # it would go on in this folder


@pytest.fixture
def one_thread(monkeypatch):
    """A thread for each process, where a test starts several at once."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Run:
    """What is on disk of the newest run: its records as `wandb leet inspect` prints them, and its files."""

    def __init__(self, folder="."):
        (self.folder,) = sorted(Path(folder).glob("wandb/*run-2*"))[-1:]
        printed = subprocess.run([WANDB, "leet", "inspect", "--json", self.folder], capture_output=True, check=True)
        self.records = [json.loads(line) for line in printed.stdout.splitlines()]
        self.history = [record["history"]["item"] for record in self.records if record["type"] == "history"]
        self.exit_code = [record["exit"]["exit_code"] for record in self.records if record["type"] == "exit"]

    def values(self, key):
        return [row[key] for row in self.history if key in row]

    def steps(self, key):
        return [row["trainer/global_step"] for row in self.history if key in row]

    def captions(self, key):
        return self.values(f"{key}.captions")[-1]

    def pictures(self, key):
        """{data set's index: pixels uint8 (28, 28)}"""
        files = self.values(f"{key}.filenames")[-1]
        return {index(c): np.array(Image.open(self.folder / "files" / f)) for c, f in zip(self.captions(key), files)}

    def table(self, key):
        return json.loads((self.folder / "files" / self.values(f"{key}.path")[-1]).read_text())["data"]


def index(caption):
    return int(re.search(r"#(\d+)", caption)[1])


def predicted_and_label(caption):
    return re.match(r"Pred: (.+) \(.+%\), Label: (.+) \(#\d+\)$", caption).groups()


def digits():
    data = DigitsDataModule("digits")
    data.prepare_data()
    return data


def probabilities_of(checkpoint, part):
    """{index: the probabilities that a checkpoint's model gives this sample}"""
    model = DigitClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    images, _, indices = part.__getitems__(range(len(part)))
    return dict(zip(indices.tolist(), model(images).softmax(dim=1)))


def run_script(*flags, folder=".", script=SCRIPT, **environment):
    """A process in a session of its own, in whose `folder` it works."""
    Path(folder).mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, script, *flags], cwd=folder, env={**os.environ, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def run_two_nodes(*flags, **how):
    """The script as on two machines with one process each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [run_script(*flags, NODE_RANK=rank, **address, **how) for rank in "01"]


def finished(*processes):
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def wait_for(condition, process):
    while not (result := condition()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return result


def last_checkpoint(folder="."):
    return next(Path(folder).glob("lightning-digits/*/checkpoints/last.ckpt"), None)



# ------------------------------------------------------------------------------------------------ a run and its logs


HEALTHY = [*DIGITS, "--max_epochs", "2", "--num_samples", "100", "--lr", "0.01"]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Two epochs on scikit-learn's digits, with pictures of 100 of the 128 validation samples."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("healthy")
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        main(HEALTHY)
        wandb.teardown()
    return Run(folder)


def test_fast_dev_run_leaves_no_file():
    main(["--fast_dev_run"])
    assert list(Path().iterdir()) == []


def test_metrics_pictures_and_charts_are_logged_over_one_axis(healthy):
    assert healthy.exit_code == [0]
    assert healthy.steps("val/examples.captions") == healthy.steps("val/recall/0") == [89, 178]  # no sanity check
    assert healthy.steps("test/hardest.captions") == healthy.steps("test/accuracy") == [178]
    assert {"train/loss", "train/accuracy", "lr-AdamW", "val/loss", "val/accuracy", "test/loss"} <= {
        key for row in healthy.history for key in row if "trainer/global_step" in row}
    assert healthy.values("test/accuracy")[-1] > 0.95


def test_examples_are_the_same_each_time_and_hardest_come_worst_first(healthy):
    first, second = healthy.values("val/examples.captions")
    assert [index(caption) for caption in first] == [index(caption) for caption in second]
    losses = [row[4] for row in healthy.table("test/predictions")]
    assert len(losses) == 200 and losses == sorted(losses, reverse=True)
    hardest = [row[0] for row in healthy.table("test/predictions")]
    assert hardest[:100] == [index(caption) for caption in healthy.captions("test/hardest")]


def test_captions_charts_and_table_are_the_predictions_of_the_best_checkpoint(healthy):
    (best,) = healthy.folder.parents[1].glob("lightning-digits/*/checkpoints/epoch*.ckpt")
    hparams = torch.load(best, weights_only=True)["hyper_parameters"]
    assert hparams["num_samples"] == 100 and hparams["dataset"] == "digits"  # the whole command line
    test = digits().test
    expected = {i: f"Pred: {p.argmax()} ({p.max():.0%}), Label: {test.labels[i]} (#{i})"
                for i, p in probabilities_of(best, test).items()}
    assert all(caption == expected[index(caption)] for caption in healthy.captions("test/examples"))
    for row in healthy.table("test/predictions"):
        assert predicted_and_label(expected[row[0]]) == (row[3], row[2])
    counts = {(actual, predicted): n for actual, predicted, n in healthy.table("test/confusion_matrix_table")}
    assert sum(counts.values()) == len(test)
    for name in "0123456789":
        actual = sum(n for (label, _), n in counts.items() if label == name)
        assert healthy.values(f"test/recall/{name}")[-1] == pytest.approx(counts[name, name] / actual)


def test_the_config_and_the_best_checkpoint_are_in_the_run(healthy):
    artifacts = [record["artifact"] for record in healthy.records if record["type"] == "artifact"]
    assert any(artifact["type"] == "model" and "best" in artifact["aliases"] for artifact in artifacts)
    config = {}
    for record in healthy.records:
        config |= record.get("config", {}).get("update", {})
    assert config["lr"] == 0.01 and config["max_epochs"] == 2 and config["seed"] == 0


def test_the_split_is_the_same_whatever_the_seed_and_proportional():
    one, other = DigitsDataModule("digits", seed=0), DigitsDataModule("digits", seed=1)
    one.prepare_data(), other.prepare_data()
    assert one.val.indices.equal(other.val.indices) and (len(one.val), len(one.test)) == (128, 257)
    parts = [set(part.indices.tolist()) for part in (one.train, one.val, one.test)]
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and len(set.union(*parts)) == 1797


class ThroughFit(pl.Trainer):
    def __init__(self, logger, callback):
        super().__init__(accelerator="cpu", max_epochs=1, logger=logger, callbacks=[callback], limit_train_batches=2,
                         enable_progress_bar=False, enable_checkpointing=False)
        self.fit(DigitClassifier(), digits())


def test_any_media_can_be_logged():
    logger = pl.loggers.WandbLogger(project="media")
    ThroughFit(logger, ImagePredictionLogger(3, to_media=lambda pixels, caption: wandb.Html(f"<p>{caption}</p>")))
    wandb.finish()
    (row,) = [row for row in Run().history if "val/examples._type" in row]
    assert "html" in row["val/examples._type"] and row["val/examples.count"] == 3


def test_another_logger_is_left_alone_and_told_once():
    callback = ImagePredictionLogger()
    with pytest.warns(UserWarning, match="no WandbLogger"):
        ThroughFit(CSVLogger("csv"), callback)
    callback.setup(ThroughFit(CSVLogger("csv"), callback), None, "test")
    assert callback.warned and not list(Path().glob("**/*.png"))


def test_what_the_callback_keeps_does_not_grow_with_the_set():
    kept = []

    class Weighed(ImagePredictionLogger):
        def _log(self, *args):
            kept.append(sum(t.untyped_storage().nbytes() for group in self.kept.values() for t in group.values()))
            super()._log(*args)

    for times in (1, 10):
        data = digits()
        data.val.indices = data.val.indices.repeat(times)
        logger = pl.loggers.WandbLogger(project="set", save_dir=f"{times} times")
        trainer = pl.Trainer(accelerator="cpu", logger=logger, callbacks=[Weighed()], enable_progress_bar=False)
        trainer.validate(DigitClassifier(), data, verbose=False)
        wandb.finish()
        assert sum(n for *_, n in Run(f"{times} times").table("val/confusion_matrix_table")) == 128 * times
    assert kept[0] == kept[1] > 0


def test_the_plain_callback_of_the_web_logs_black_pictures_and_ours_does_not():
    floats = torch.linspace(0, 1, 784).reshape(1, 28, 28)
    logged = lambda picture: np.array(Image.open(picture._path))
    assert logged(wandb.Image(floats)).max() <= 1  # what the widely copied callback gets
    pixels = (floats * 255).round().to(torch.uint8)
    for picture in (train.exact_image(floats, ""), train.exact_image(pixels, "")):
        assert np.array_equal(logged(picture), pixels[0].numpy())


# ------------------------------------------------------------------------------------------------------ the data set


def write_mnist(folder, n=48, **damage):
    """A set of four files in MNIST's format; `damage` replaces a file's bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n.to_bytes(4, "big") + labels.tobytes())
    return folder


@contextlib.contextmanager
def web_server(answer):
    """`answer(handler)` is called for each GET."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                answer(self)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Puts a server with a small MNIST in the place of torchvision's mirrors; yields its files, to be spoiled."""
    raw = write_mnist(tmp_path / "mirror")
    files = {f"/{file.name}.gz": gzip.compress(file.read_bytes()) for file in raw.iterdir()}
    resources = [(name[1:], hashlib.md5(content).hexdigest()) for name, content in files.items()]

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(files[handler.path])))
        handler.end_headers()
        handler.wfile.write(files[handler.path][: files.get("cut")])

    with web_server(answer) as address:
        monkeypatch.setattr(MNIST, "mirrors", [address])
        monkeypatch.setattr(MNIST, "resources", resources)
        yield files


def test_mnist_is_downloaded_where_it_is_missing(mirror, tmp_path):
    data = DigitsDataModule(data_dir="data")
    data.prepare_data()
    data.setup()
    assert data.dataset == "mnist" and (len(data.train), len(data.val), len(data.test)) == (44, 4, 48)
    assert {file.name for file in Path("data/MNIST/raw").iterdir()} == {f.name for f in (tmp_path / "mirror").iterdir()}
    images, labels, indices = data.val.__getitems__([0, 1])
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (2, 1, 28, 28), torch.int64)


@pytest.mark.parametrize("stall", [False, True])
def test_a_download_that_breaks_off_leaves_nothing_and_digits_take_its_place(mirror, monkeypatch, capsys, stall):
    mirror["cut"] = 100
    if stall:
        listener = socket.create_server(("127.0.0.1", 0))  # it takes connections and never answers
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{listener.getsockname()[1]}/"])
        monkeypatch.setattr(DigitsDataModule._download, "__defaults__", (1,))
    data = DigitsDataModule(data_dir="data")
    data.prepare_data()
    assert data.dataset == "digits" and not [file for file in Path("data").rglob("*") if file.is_file()]
    (line,) = capsys.readouterr().out.splitlines()
    assert "MNIST is not in data" in line and "put its four files into" in line
    with pytest.raises(UserError, match="mnist is not in --data_dir data"):
        DigitsDataModule("mnist", "data").prepare_data()


@given(which=st.integers(0, 3), cut=st.integers(0, 47), flip=st.none() | st.integers(1, 255), byte=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_named(tmp_path_factory, which, cut, flip, byte):
    """Truncated anywhere, or with another number in its magic or its count."""
    raw = write_mnist(tmp_path_factory.mktemp("data") / "MNIST" / "raw")
    file = DigitsDataModule(data_dir=raw.parents[1])._files("mnist")[which]
    content = bytearray(file.read_bytes())
    if flip is None:
        content = content[:cut]
    elif byte < 2:
        content[0] ^= flip
    else:
        content[byte] ^= flip
    file.write_bytes(content)
    data = DigitsDataModule("mnist", raw.parents[1])
    with pytest.raises(UserError) as error:
        data.prepare_data()
    pair = file.name.split("-")[0]  # that a count differs can be seen in the labels' file alone
    assert f"{pair}-" in str(error.value) and "delete it" in str(error.value) and "\n" not in str(error.value)


def test_a_label_outside_0_to_9_is_named(tmp_path):
    labels = write_mnist(tmp_path / "MNIST" / "raw") / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is damaged .* delete it"):
        DigitsDataModule("mnist", tmp_path).prepare_data()


# --------------------------------------------------------------------------------- what the dashboard was made to show


def classes_always_wrong(run):
    return [name for name in "0123456789" if run.values(f"val/recall/{name}")[-1] == 0]


def captions_contradict_accuracy(run):
    pairs = [predicted_and_label(caption) for caption in run.captions("val/examples")]
    return abs(np.mean([p == label for p, label in pairs]) - run.values("val/accuracy")[-1]) > 0.2


def no_better_than_chance(run):
    return run.values("val/accuracy")[-1] < 0.25


def labelled_5_but_surely_4(run):
    top = run.captions("val/hardest")[:5]
    return [index(caption) for caption in top if predicted_and_label(caption) == ("4", "5")]


def pictures_that_are_not_the_data_sets(run):
    images = digits().val.images
    return [i for i, pixels in run.pictures("val/examples").items() if not np.array_equal(images[i, 0].numpy(), pixels)]


def test_a_healthy_run_raises_no_alarm(healthy):
    assert classes_always_wrong(healthy) == labelled_5_but_surely_4(healthy) == []
    assert not captions_contradict_accuracy(healthy) and not no_better_than_chance(healthy)
    assert len(healthy.pictures("val/examples")) == 100 and pictures_that_are_not_the_data_sets(healthy) == []


def broken_run(monkeypatch, spoil_data=None, **spoiled_methods):
    load = DigitsDataModule._load

    def load_and_spoil(self):
        load(self)
        if spoil_data:
            spoil_data(self)

    monkeypatch.setattr(DigitsDataModule, "_load", load_and_spoil)
    for name, method in spoiled_methods.items():
        monkeypatch.setattr(DigitClassifier, name, method)
    main([*DIGITS, "--max_epochs", "1", "--num_samples", "100", "--lr", "0.01"])
    return Run()


def test_a_class_that_is_always_wrong_is_a_recall_of_zero(monkeypatch):
    def train_without_fours(data):
        data.train.indices = data.train.indices[data.train.labels[data.train.indices] != 4]

    run = broken_run(monkeypatch, train_without_fours)
    losses = run.values("train/loss")
    assert losses[-1] < losses[0] / 5 and run.values("val/accuracy")[-1] > 0.8  # all looks fine, but
    assert classes_always_wrong(run) == ["4"]
    assert not [n for actual, predicted, n in run.table("val/confusion_matrix_table") if predicted == "4" and n]


def test_a_wrong_accuracy_is_contradicted_by_the_captions(monkeypatch):
    def against_shifted_labels(self, batch, accuracy, loss, evaluate=DigitClassifier._evaluate):
        images, labels, indices = batch
        logits = evaluate(self, batch, train.MulticlassAccuracy(10), loss)
        accuracy.update(logits, labels.roll(1))
        return logits

    run = broken_run(monkeypatch, _evaluate=against_shifted_labels)
    assert captions_contradict_accuracy(run)
    assert run.values("val/accuracy")[-1] < 0.3 and run.values("val/recall/0")[-1] > 0.8  # the captions are right


def test_shuffled_labels_cannot_be_learnt_and_do_not_fit_the_pictures(monkeypatch):
    true = digits().val.labels
    shuffled = true[torch.randperm(len(true))]

    def shuffle(data):
        data.train.labels = data.val.labels = shuffled

    run = broken_run(monkeypatch, shuffle)
    assert no_better_than_chance(run)
    shown = {index(caption): int(predicted_and_label(caption)[1]) for caption in run.captions("val/examples")}
    assert all(label == shuffled[i] for i, label in shown.items())
    assert np.mean([label == true[i].item() for i, label in shown.items()]) < 0.3


def test_flipped_labels_fill_the_top_of_hardest(monkeypatch):
    def call_five_fours_five(data):
        data.val.labels = data.val.labels.clone()
        fours = data.val.indices[data.val.labels[data.val.indices] == 4][:5]
        data.val.labels[fours] = 5
        data.flipped = fours

    run = broken_run(monkeypatch, call_five_fours_five)
    assert sorted(labelled_5_but_surely_4(run)) == sorted(digits().flipped.tolist())


@pytest.mark.parametrize("spoil", ["normalised twice", "transposed", "black"])
def test_a_picture_shows_what_the_model_really_got(monkeypatch, spoil):
    forward = DigitClassifier.forward

    def normalised_twice(self, images):
        once = ((images.float() / 255 - self.MEAN) / self.STD)
        return self.network((once / 255 - self.MEAN) / self.STD)

    spoiled = {"normalised twice": normalised_twice, "transposed": lambda self, x: forward(self, x.transpose(2, 3)),
               "black": lambda self, images: forward(self, images * 0)}[spoil]
    run = broken_run(monkeypatch, forward=spoiled)
    assert len(pictures_that_are_not_the_data_sets(run)) > 95
    (i, pixels), *_ = run.pictures("val/examples").items()
    assert spoil != "transposed" or np.array_equal(pixels.T, digits().val.images[i, 0].numpy())
    assert spoil == "transposed" or pixels.max() - pixels.min() < 10


# ------------------------------------------------------------------------------------------------------ many devices


def evidence(run):
    """All that is logged after the test, but for the pictures' names; probabilities rounded."""
    captions = run.captions("test/examples"), run.captions("test/hardest")
    rows = run.table("test/predictions")
    table = [[row[0], row[2], row[3], *(round(number, 3) for number in row[4:])] for row in rows]
    recalls = [run.values(f"test/recall/{name}") for name in "0123456789"]
    return captions, table, recalls, run.table("test/confusion_matrix_table"), run.values("test/accuracy")


def test_two_processes_and_two_nodes_log_what_one_does(healthy, one_thread):
    checkpoint = ["--ckpt_path", str(last_checkpoint(healthy.folder.parents[1]))]
    processes = run_script(*HEALTHY, *checkpoint, "--devices", "2", "--strategy", "ddp", folder="processes")
    nodes = run_two_nodes(*HEALTHY, *checkpoint, "--devices", "1", "--num_nodes", "2", folder="nodes")
    main([*HEALTHY, *checkpoint])
    finished(processes, *nodes)
    for folder in ("processes", "nodes"):
        assert len(list(Path(folder).glob("wandb/*run-2*"))) == 1  # one run, not one a rank
        for found, expected in zip(evidence(Run(folder)), evidence(Run())):
            assert found == expected


FOREIGN_PROJECT = """
import pytorch_lightning as pl, torch, wandb
from torch.utils.data import DataLoader, TensorDataset
from train import ImagePredictionLogger

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
    def validation_step(self, batch, batch_idx):
        return self.layer(batch[0])

if __name__ == "__main__":
    for n in (5, 1):
        torch.manual_seed(0)
        data = TensorDataset(torch.rand(n, 4), torch.arange(n) % 3, torch.arange(n))
        logger = pl.loggers.WandbLogger(project="foreign")
        callback = ImagePredictionLogger(4, to_media=lambda sample, caption: wandb.Html(caption))
        callback.on_validation_epoch_end = lambda trainer, module: callback._log(trainer, module, "val")
        trainer = pl.Trainer(accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", logger=logger,
                             callbacks=[callback], enable_progress_bar=False, enable_model_summary=False)
        trainer.validate(Model(), [DataLoader(data, batch_size=2)] if n == 5 else DataLoader(data), verbose=False)
        if trainer.is_global_zero:
            wandb.finish()
"""


def test_where_a_sampler_pads_with_duplicates_each_sample_counts_once(one_thread):
    Path("foreign.py").write_text(FOREIGN_PROJECT)
    finished(*run_two_nodes(script="foreign.py", PYTHONPATH=str(SCRIPT.parent)))
    tables = [json.loads(file.read_text())["data"] for file in Path().glob("wandb/*run-2*/files/media/table/val/*")]
    assert sorted(sum(n for *_, n in table) for table in tables) == [1, 5]


# --------------------------------------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_command_that_resumes(monkeypatch, capsys, number):
    training_step = DigitClassifier.training_step

    def interrupted_step(self, batch, batch_idx):
        if self.global_step == 120:
            os.kill(os.getpid(), number)
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(DigitClassifier, "training_step", interrupted_step)
        main([*DIGITS, "--max_epochs", "2"])
    assert stop.value.code == 128 + number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a notebook can go on
    stopped = Run()
    assert stopped.exit_code == [128 + number]
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    run_id, *command = shlex.split(last_line.removeprefix("Resume it: "))
    assert command[:2] == ["python", "train.py"] and command[-1].endswith("interrupted.ckpt")
    if number == signal.SIGTERM:
        return  # a checkpoint is a checkpoint: to resume once is enough
    wandb.teardown()  # which has read the environment
    monkeypatch.setenv(*run_id.split("="))
    main(command[2:])
    resumed = Run()
    assert resumed.folder.name.endswith(stopped.folder.name[-8:]) and resumed.exit_code == [0]
    steps = stopped.steps("train/loss") + resumed.steps("train/loss")
    assert len(set(steps)) == len(steps) and resumed.steps("test/accuracy") == [178]


def test_two_processes_stop_together(one_thread):
    """Ctrl+C reaches both processes of a machine; SIGTERM here only the first of two machines."""
    flags = [*DIGITS, "--strategy", "ddp", "--max_epochs", "1000"]
    interrupted = run_script(*flags, "--devices", "2", folder="SIGINT")
    terminated, other_node = run_two_nodes(*flags, "--devices", "1", "--num_nodes", "2", folder="SIGTERM")
    wait_for(lambda: last_checkpoint("SIGTERM"), terminated)
    terminated.terminate()
    wait_for(lambda: last_checkpoint("SIGINT"), interrupted)
    os.killpg(interrupted.pid, signal.SIGINT)
    for process, folder, status in ((interrupted, "SIGINT", 130), (terminated, "SIGTERM", 143)):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == status and "Traceback" not in output
        assert output.strip().splitlines()[-1].startswith("Resume it: ")
        assert Run(folder).exit_code == [status]
        torch.load(last_checkpoint(folder).with_name("interrupted.ckpt"), weights_only=True)
        val = digits().val
        losses = [-p[val.labels[i]].log().item() for i, p in probabilities_of(last_checkpoint(folder), val).items()]
        assert Run(folder).values("val/loss")[-1] == pytest.approx(np.mean(losses), rel=1e-3)  # both had one batch norm
    assert "Traceback" not in other_node.communicate(timeout=60)[0] and other_node.returncode == 143


def test_a_run_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(healthy):
    process = run_script(*HEALTHY)
    killed = wait_for(last_checkpoint, process)
    process.kill()
    process.communicate()
    for file in killed.parent.glob("*.ckpt"):  # no half-written one
        assert torch.load(file, weights_only=True)["epoch"] == 0
    main([*HEALTHY, "--ckpt_path", str(killed)])
    _, resumed = sorted(Path().glob("lightning-digits/*/checkpoints/last.ckpt"), key=os.path.getmtime)
    files = resumed, last_checkpoint(healthy.folder.parents[1])
    weights = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_full_disk_gets_one_line_and_the_last_checkpoint_is_intact(monkeypatch, capsys):
    """A limit on the size of files stands for the disk: the second epoch's checkpoint can't be written."""
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    end = DigitClassifier.on_validation_epoch_end

    def end_with_full_disk(self):
        if self.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
        end(self)

    monkeypatch.setattr(DigitClassifier, "on_validation_epoch_end", end_with_full_disk)
    try:
        with pytest.raises(SystemExit) as stop:
            main([*DIGITS, "--max_epochs", "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    printed = capsys.readouterr()
    assert stop.value.code == 1 and "error: [Errno 27] File too large" in printed.err
    assert "Traceback" not in printed.err and "Resume it: " in printed.out
    assert Run().exit_code == [1] and torch.load(last_checkpoint(), weights_only=True)["epoch"] == 0
    assert all(file.suffix == ".ckpt" for file in last_checkpoint().parent.iterdir())


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.ckpt"
    train.AtomicCheckpointIO().save_checkpoint({"good": 1}, file)
    with pytest.raises(Exception):
        train.AtomicCheckpointIO().save_checkpoint({"bad": lambda: None}, file)
    assert torch.load(file, weights_only=True) == {"good": 1} and [f.name for f in tmp_path.glob("a*")] == ["a.ckpt"]


def test_a_loss_that_is_not_finite_fails_the_run_and_shows_the_batch(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*DIGITS, "--lr", "1e30"])
    assert stop.value.code == 1 and "the loss is not finite at step" in capsys.readouterr().err
    run = Run()
    assert run.exit_code == [1] and len(run.captions("train/last_batch")) == 32


# -------------------------------------------------------------------------------------------------------- the tracker


def start_a_run(handler):
    """As much of W&B's server as a run needs to be online."""
    body = handler.rfile.read(int(handler.headers["Content-Length"] or 0)).decode(errors="ignore")
    name = re.search('"name":"(.{8})"', body)
    name = name and name[1]
    project = {"id": "1", "name": "lightning-digits", "entity": {"id": "1", "name": "me"}}
    answers = {
        "query Viewer": {"data": {"viewer": {"id": "1", "entity": "me", "username": "me", "teams": {"edges": []}}}},
        "RunResumeStatus": {"data": {"model": None}},
        "upsertBucket": {"data": {"upsertBucket": {"inserted": True, "bucket": {
            "id": "1", "name": name, "displayName": "1", "config": "{}", "project": project, "historyLineCount": 0}}}},
        "files": {"limits": {}},
    }
    answer = next((answer for name, answer in answers.items() if name in body), {"errors": [{"message": "not here"}]})
    content = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def test_no_failure_of_the_tracker_stops_the_training(monkeypatch, capsys, one_thread):
    key = "0123456789abcdef" * 2 + "01234567"
    flags = [*DIGITS, "--max_epochs"]
    monkeypatch.delenv("WANDB_MODE")
    for name, value in {"API_KEY": key, "HTTP_TIMEOUT": "1", "FINISH_TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    outputs = {}
    with web_server(start_a_run) as address:
        process = run_script(*flags, "2", folder="goes away", WANDB_BASE_URL=address)
        wait_for(lambda: last_checkpoint("goes away"), process)
    with web_server(lambda handler: handler.send_error(500)) as failing, socket.create_server(("", 0)) as silent:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = {"refuses": closed.getsockname()[1], "never answers": silent.getsockname()[1]}
        for failure, address in {"fails": failing, **{f: f"http://127.0.0.1:{p}" for f, p in port.items()}}.items():
            Path(failure).mkdir()
            monkeypatch.setenv("WANDB_BASE_URL", address)
            with contextlib.chdir(failure):
                main([*flags, "1"])
            wandb.teardown()  # which has read the environment
            outputs[failure] = capsys.readouterr().out
            assert len(re.findall("W&B can't be reached .* `wandb sync`", outputs[failure])) == 1
    (outputs["goes away"],) = finished(process)
    assert "offline" not in outputs["goes away"] and "wandb sync wandb/run-2" in outputs["goes away"]
    for failure, output in outputs.items():
        run = Run(failure)
        assert run.exit_code == [0] and run.values("val/hardest.captions") and run.table("test/predictions")
        (last,) = run.steps("test/accuracy")
        assert run.steps("train/loss") == list(range(9, last, 10))
        assert key not in output
    assert not [file for file in Path().rglob("*") if file.is_file() and key.encode() in file.read_bytes()]


# -------------------------------------------------------------------------------------------------------- wrong input


def refused(capsys, *flags):
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("train.py: error: ") and set(Path().rglob("*")) == before
    return line


NUMBERS = ["--num_nodes", "--max_epochs", "--batch_size", "--lr", "--num_samples"]


@pytest.mark.parametrize("flags", [
    *([flag, wrong] for flag in NUMBERS for wrong in ("0", "-1", "nan", "inf", "x")),
    *(["--seed", wrong] for wrong in ("-1", "x", "99999999999")), *(["--devices", wrong] for wrong in ("0", "-3", "x")),
    ["--num_samples", "109"], ["--unknown"], ["--max_epoch", "1"], ["--gpus", "x"], ["--gpus", "-2"],
    ["--gpus", "1", "--devices", "1"], ["--gpus", "0", "--accelerator", "cpu"], ["--strategy", "x"],
    ["--precision", "x"], ["--accelerator", "x"], ["--dataset", "x"],
], ids=" ".join)
def test_a_wrong_flag_gets_one_line(capsys, flags):
    assert flags[0].lstrip("-").split("_")[0] in refused(capsys, *flags, *([] if "--accelerator" in flags or "--gpus" in
                                                         flags else ["--accelerator", "cpu"])).lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_get_one_line(capsys):
    assert "--gpus 0 trains on the CPU" in refused(capsys, "--gpus", "1")
    trainer = train.make_trainer(train.make_parser().parse_args(["--gpus", "0"]))
    assert isinstance(trainer.accelerator, pl.accelerators.CPUAccelerator)


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_file_that_is_no_checkpoint_gets_one_line_and_is_not_executed(capsys):
    other = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    other.strategy.connect(torch.nn.Linear(1, 1))
    Path("pickle.ckpt").write_bytes(pickle.dumps(Dangerous()))
    torch.save({"state_dict": Dangerous()}, "dangerous.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, "other.ckpt")
    Path("garbage.ckpt").write_bytes(b"garbage")
    for name in ("pickle.ckpt", "dangerous.ckpt", "other.ckpt", "garbage.ckpt", ".", "missing.ckpt"):
        assert name in refused(capsys, *DIGITS, "--ckpt_path", name)


def test_a_data_dir_that_is_a_file_gets_one_line(capsys):
    Path("file").write_text("")
    assert "can't be written" in refused(capsys, "--accelerator", "cpu", "--data_dir", "file")
    assert "can't be written" in refused(capsys, "--accelerator", "cpu", "--data_dir", "file/below")


def test_a_wandb_folder_that_cannot_be_written_gets_one_line(capsys, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setenv("WANDB_DIR", str(Path("file").absolute()))
    assert "set WANDB_DIR" in refused(capsys, *DIGITS)
