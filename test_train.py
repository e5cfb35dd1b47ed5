"""Each test proves a claim of the README on real parts: training, offline W&B runs, signals, processes."""

import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import wandb
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset, random_split
from torchvision.datasets import MNIST

import train
from train import DigitClassifier, DigitsDataModule, ImagePredictionLogger, load_dataset, main

SCRIPT = Path(train.__file__)
DIGITS = ["--dataset", "digits", "--accelerator", "cpu"]
KEY = "0123456789abcdef" * 2 + "01234567"
HEALTHY = [*DIGITS, "--max_epochs", "2", "--num_samples", "100", "--lr", "0.01"]
torch.set_num_threads(1)  # the processes below share two cores with these tests
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning warns at each self.log


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working folder, and W&B offline: whoever runs the tests may have an account."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()  # it would go on in this folder


def parse(caption):
    prediction, label, index = re.match(r"Pred: (.+) \(.+%\), Label: (.+) \(#(\d+)\)$", caption).groups()
    return prediction, label, int(index)


class Run:
    """What is on disk of the newest run: its records as `wandb leet inspect` prints them, and its files."""

    def __init__(self, folder="."):
        self.folder = sorted(Path(folder).absolute().glob("wandb/*run-2*"))[-1]
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", self.folder]
        printed = subprocess.run(command, capture_output=True, check=True).stdout
        self.records = [json.loads(line) for line in printed.splitlines()]
        self.history = [record["history"]["item"] for record in self.records if record["type"] == "history"]
        self.exit_code = [record["exit"]["exit_code"] for record in self.records if record["type"] == "exit"]

    def rows(self, key):
        return [row for row in self.history if key in row]

    def last(self, key):
        return self.rows(key)[-1][key]

    def pictures(self, key):
        """{index: pixels uint8 (H, W)}"""
        names, captions = self.last(f"{key}.filenames"), self.last(f"{key}.captions")
        return {parse(c)[2]: np.array(Image.open(self.folder / "files" / n)) for c, n in zip(captions, names)}

    def confusion(self, key="val/confusion_matrix"):
        """{(label, prediction): count}"""
        table = json.loads((self.folder / "files" / self.last(f"{key}_table.path")).read_text())
        return {(label, prediction): count for label, prediction, count in table["data"]}

    def checkpoint(self, pattern="last.ckpt"):
        folder = self.folder.parents[1] / "lightning-digits" / self.folder.name[-8:] / "checkpoints"
        return str(next(folder.glob(pattern)))

    def classes_always_wrong(self):
        return [name for name in "0123456789" if self.last(f"val/recall/{name}") == 0]

    def captions_contradict_accuracy(self):
        samples = [parse(caption) for caption in self.last("val/examples.captions")]
        accuracy = np.mean([prediction == label for prediction, label, _ in samples])
        return abs(accuracy - self.last("val/accuracy")) > 0.2

    def labelled_5_but_surely_4(self):
        top = [parse(caption) for caption in self.last("val/hardest.captions")[:5]]
        return sorted(index for prediction, label, index in top if (prediction, label) == ("4", "5"))

    def pictures_that_are_not_the_data_sets(self):
        images = load_dataset("digits", "", train=True).tensors[0][:, 0].numpy()
        return [i for i, pixels in self.pictures("val/examples").items() if (images[i] != pixels).any()]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Two epochs on scikit-learn's digits, with pictures of 100 of the 128 validation samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("healthy"))
        patch.setenv("WANDB_MODE", "offline")
        main(HEALTHY)
        wandb.teardown()
        return Run()


def send(number, at_step):
    """A hook of the LightningModule that sends a signal to the first of the processes."""
    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == at_step and self.global_rank == 0:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one kills
    return on_train_batch_start


@pytest.fixture(scope="module")
def processes(healthy, tmp_path_factory):
    """Three runs, side by side and beside the tests that follow: {folder: process}."""
    two, resumed = ["--devices", "2", "--strategy", "ddp"], ["--ckpt_path", healthy.checkpoint()]
    unreachable = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    started = {}
    for name, command, variables in [
        ("tested", [SCRIPT, *HEALTHY, *two, *resumed, "--batch_size", "100"], {}),
        ("stopped", [__file__, *DIGITS, *two], {}),
        ("unreachable", [SCRIPT, *DIGITS, "--max_epochs", "1"], unreachable),
    ]:
        folder = tmp_path_factory.mktemp(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent), **variables}
        started[folder] = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return started


def test_fast_dev_run_goes_through_the_callback_and_leaves_no_file(monkeypatch):
    main(["--fast_dev_run"])
    assert list(Path().iterdir()) == []
    monkeypatch.setattr(wandb.plot, "confusion_matrix", None)
    with pytest.raises(TypeError):
        main(["--fast_dev_run"])


def test_a_validation_is_one_row_and_a_healthy_one_raises_no_alarm(healthy, processes):
    first, second = healthy.rows("val/examples.captions")  # and none of the sanity check
    keys = {"val/loss", "val/hardest.captions", "val/recall/0", "val/confusion_matrix_table.path"}
    assert keys <= set(first) and keys <= set(second)
    assert [row["trainer/global_step"] for row in (first, second)] == [88, 177]
    examples = [parse(caption)[2] for caption in first["val/examples.captions"]]
    assert examples == [parse(caption)[2] for caption in second["val/examples.captions"]]
    assert len(set(examples)) == 100 and sorted(examples) != examples  # mixed, but always the same
    assert healthy.rows("train/loss") and healthy.rows("train/accuracy") and healthy.rows("lr-AdamW")
    assert healthy.last("test/accuracy") > 0.95 and healthy.exit_code == [0]
    assert len(healthy.pictures("val/examples")) == 100 and not healthy.captions_contradict_accuracy()
    assert not healthy.pictures_that_are_not_the_data_sets() and not healthy.labelled_5_but_surely_4()
    assert not healthy.classes_always_wrong()


def test_panels_show_what_the_best_checkpoint_says_and_it_is_an_artifact(healthy):
    best = healthy.checkpoint("epoch*")
    model = DigitClassifier.load_from_checkpoint(best, weights_only=True).eval()
    sets = random_split(load_dataset("digits", "", True), [1413, 128, 256], torch.Generator().manual_seed(0))
    images, labels, indices = (torch.stack(column) for column in zip(*sets[2]))
    logits = model(images)
    confidences, predictions = logits.softmax(1).max(1)
    hardest = F.cross_entropy(logits, labels, reduction="none").argsort(descending=True)[:20]
    samples = zip(predictions.tolist(), confidences.tolist(), labels.tolist(), indices.tolist())
    captions = [f"Pred: {p} ({confidence:.0%}), Label: {label} (#{i})" for p, confidence, label, i in samples]
    assert healthy.last("test/hardest.captions")[:20] == [captions[position] for position in hardest]
    assert set(healthy.last("test/examples.captions")) <= set(captions)
    for (label, prediction), count in healthy.confusion("test/confusion_matrix").items():
        has_label, has_prediction = labels == int(label), predictions == int(prediction)
        assert count == (has_label & has_prediction).sum()
        if label == prediction:
            assert healthy.last(f"test/recall/{label}") == pytest.approx(count / has_label.sum().item())
    configs = [record["config"].get("update", {}) for record in healthy.records if "config" in record]
    assert any({"lr": 0.01, "max_epochs": 2}.items() <= model.hparams.items() <= c.items() for c in configs)
    (models,) = [r["artifact"] for r in healthy.records if "best" in r.get("artifact", {}).get("aliases", [])]
    assert models["manifest"]["contents"][0]["path"] == Path(best).name


def test_where_mnist_cannot_be_had_digits_take_its_place_but_damage_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    data = DigitsDataModule(None, "data", 128)
    data.prepare_data()
    assert data.dataset == "digits" and "No MNIST in data" in capsys.readouterr().out
    assert "mnist in data" in refused(capsys, "--dataset", "mnist")
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        Path(f"data/MNIST/raw/{name}-ubyte").write_bytes(b"\0\0\x08\x03 damaged")
    assert "mnist in data can't be read" in refused(capsys)


def broken_run(monkeypatch, spoil_data=lambda data: None):
    setup = DigitsDataModule.setup

    def setup_and_spoil(self, stage):
        setup(self, stage)
        spoil_data(self)

    monkeypatch.setattr(DigitsDataModule, "setup", setup_and_spoil)
    main([*DIGITS, "--max_epochs", "1", "--num_samples", "100", "--lr", "0.01"])
    return Run()


def test_a_class_that_is_always_wrong_is_a_recall_of_zero(monkeypatch):
    def train_without_fours(data):
        data.train.indices = [i for i in data.train.indices if data.train.dataset.tensors[1][i] != 4]
    monkeypatch.setattr(DigitClassifier, "on_fit_end", lambda self: self.network[-1].weight.data.zero_())
    run = broken_run(monkeypatch, train_without_fours)
    losses = [row["train/loss"] for row in run.rows("train/loss")]
    assert losses[-1] < losses[0] / 5 and run.last("val/accuracy") > 0.8 and run.last("test/recall/0") > 0.8
    assert run.classes_always_wrong() == ["4"]
    assert not any(count for (_, prediction), count in run.confusion().items() if prediction == "4")


def test_a_wrong_accuracy_is_contradicted_by_the_captions(monkeypatch):
    accuracy = train.multiclass_accuracy
    monkeypatch.setattr(train, "multiclass_accuracy", lambda p, y, *a, **k: accuracy(p, y.roll(1), *a, **k))
    run = broken_run(monkeypatch)
    assert run.captions_contradict_accuracy()
    assert run.last("val/accuracy") < 0.3 and run.last("val/recall/0") > 0.8  # the captions are right


def test_shuffled_labels_cannot_be_learnt_and_do_not_fit_the_pictures(monkeypatch):
    true = load_dataset("digits", "", train=True).tensors[1]
    shuffled = true[torch.randperm(len(true))]
    run = broken_run(monkeypatch, lambda data: data.train.dataset.tensors[1].copy_(shuffled))
    assert run.last("val/accuracy") < 0.25
    shown = [parse(caption)[1:] for caption in run.last("val/examples.captions")]
    assert all(int(label) == shuffled[index] for label, index in shown)
    assert np.mean([int(label) == true[index] for label, index in shown]) < 0.3


def test_flipped_labels_fill_the_top_of_hardest(monkeypatch):
    flipped = []

    def call_five_fours_five(data):
        labels = data.val.dataset.tensors[1]
        flipped[:] = [i for i in data.val.indices if labels[i] == 4][:5]
        labels[flipped] = 5

    assert broken_run(monkeypatch, call_five_fours_five).labelled_5_but_surely_4() == sorted(flipped)


@pytest.mark.parametrize("spoil", [
    lambda images: (images / 255 - 0.1) / 0.3, lambda images: images.mT, lambda images: images * 0,
], ids=["normalised twice", "transposed", "black"])
def test_a_picture_shows_what_the_model_really_got(monkeypatch, spoil):
    forward = DigitClassifier.forward
    monkeypatch.setattr(DigitClassifier, "forward", lambda self, images: forward(self, spoil(images)))
    run = broken_run(monkeypatch)
    assert len(run.pictures_that_are_not_the_data_sets()) > 95
    images = load_dataset("digits", "", train=True).tensors[0]
    for index, pixels in run.pictures("val/examples").items():
        assert (pixels == spoil(images[index])[0].clamp(0, 255).round().numpy()).all()


IMAGES, LABELS = torch.rand(10, 1, 8, 8), torch.arange(10) % 3
PAIRS, NORMALIZED = TensorDataset(IMAGES, LABELS), TensorDataset((IMAGES - 0.5) / 0.25, LABELS)
DICTS, BINARY = StackDataset(image=IMAGES, label=LABELS), TensorDataset(IMAGES, (LABELS > 0).int()[:, None])
TEXT, MAPS = TensorDataset(torch.randint(7, (10, 5)), LABELS), TensorDataset(IMAGES, IMAGES[:, 0].long())


def net(classes=3):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, classes))


def validate(datasets, net, step=lambda module, batch: None, package="pytorch_lightning", **arguments):
    """The run of a module of another project with the callback, which is copied out of train.py."""
    source = SCRIPT.read_text().replace("pytorch_lightning", package)
    imports, callback = source.index("import argparse"), source.index("class ImagePredictionLogger")
    names = {}
    exec(source[imports:source.index("# ---")] + source[callback:source.index("class StopAtBatchEnd")], names)

    class Module(names["pl"].LightningModule):
        def forward(self, inputs):
            return self.net(inputs)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", float(batch_idx), logger=datasets != [BINARY])  # else it logs nothing
            return step(self, batch)

    module = Module()
    module.net = net
    trainer = names["pl"].Trainer(
        accelerator="cpu", logger=names["WandbLogger"](project="other"), enable_progress_bar=False,
        callbacks=[names["ImagePredictionLogger"](4, **arguments)])
    with trainer.logger.experiment:  # it ends with the block
        for _ in range(2):
            trainer.validate(module, [DataLoader(dataset, 4) for dataset in datasets], verbose=False)
    return Run()


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("dataset, net, step, arguments", [
    (PAIRS, net(), lambda module, batch: None, {}),
    (PAIRS, net(), lambda module, batch: module.forward(batch[0]).mean(), {}),
    (DICTS, nn.ModuleList([net()]), lambda module, batch: {"logits": module.net[0](batch["image"])},
     {"unpack": lambda batch: (batch["image"], batch["label"])}),
    (NORMALIZED, net(), lambda module, batch: None, {"mean": [0.5], "std": [0.25]}),
    (BINARY, net(1), lambda module, batch: module(batch[0]), {}),
], ids=["nothing", "forward", "dict", "normalized", "one logit"])
def test_the_copied_callback_shows_what_other_modules_do(package, dataset, net, step, arguments):
    pytest.importorskip(package)
    run = validate([dataset], net, step, package, **arguments)
    assert sum(run.confusion().values()) == 10 and len(run.pictures("val/hardest")) == 4
    assert ["val_loss" in row for row in run.rows("val/hardest.captions")] == [dataset is not BINARY] * 2
    for i, pixels in run.pictures("val/hardest").items():
        assert (pixels == (IMAGES[i, 0] * 255).round().byte().numpy()).all()


def test_floats_beyond_0_to_1_are_stretched_with_a_warning():
    with pytest.warns(UserWarning, match="ImagePredictionLogger stretches .* give mean and std"):
        run = validate([NORMALIZED], net())
    for i, pixels in run.pictures("val/hardest").items():
        assert abs(np.interp(IMAGES[i, 0], (IMAGES[i].min(), IMAGES[i].max()), (0, 255)) - pixels).max() < 1


def test_two_loaders_of_text():
    run = validate([TEXT, TEXT], nn.EmbeddingBag(7, 3), to_media=lambda tokens, caption: wandb.Html(caption))
    first, _ = run.rows("val/hardest.count")
    assert first["val/hardest.count"] == first["val/hardest/dataloader_idx_1.count"] == 4
    assert any("Pred: " in page.read_text() for page in run.folder.rglob("*.html"))


@pytest.mark.parametrize("dataset, net, names, message", [
    (MAPS, nn.Conv2d(1, 3, 1), None, "logits"), (TEXT, nn.EmbeddingBag(7, 3), None, "give to_media"),
    (PAIRS, net(), ["a", "b"], "3 classes"), (TensorDataset(IMAGES, LABELS, LABELS), net(), None, "indices"),
    (TensorDataset(IMAGES, LABELS + 1), net(), None, "Target 3 is out of bounds"),
    (TensorDataset(IMAGES, IMAGES[:, 0, 0]), net(), None, "labels tensor"),
], ids=["map", "no picture", "names", "indices", "outside", "soft"])
def test_what_cannot_be_shown_is_an_error(dataset, net, names, message):
    with pytest.raises(ValueError, match=f"^ImagePredictionLogger .*{message}"):
        validate([dataset], net, class_names=names)


def test_without_wandb_it_says_so_and_it_keeps_the_pictures_of_few_samples():
    callback = ImagePredictionLogger(to_media=lambda picture, caption: None)
    counts = []
    count = pl.callbacks.LambdaCallback(on_test_batch_end=lambda *_: counts.append(len(callback.pictures)))
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback, count])
    loader = DataLoader(load_dataset("digits", "", train=True), 128)
    with pytest.warns(UserWarning, match="no WandbLogger"):
        trainer.test(DigitClassifier(), loader, verbose=False)
    assert 32 <= max(counts) <= 64
    assert {picture.untyped_storage().nbytes() for picture in callback.pictures.values()} == {28 * 28 * 4}


def test_an_interrupted_run_is_resumed_by_its_last_line_and_for_more_epochs(monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(DigitClassifier, "on_train_batch_start", send(signal.SIGINT, at_step=120))
        main([*DIGITS, "--max_epochs", "2"])
    stopped = Run()
    assert stop.value.code == 130 and stopped.exit_code == [130]
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)  # as it was before
    run_id, python, script, *flags = shlex.split(capsys.readouterr().out.split("Resume it: ")[1])
    assert (python, script) == ("python", "train.py")
    wandb.teardown()  # which has read the environment
    monkeypatch.setenv(*run_id.split("="))
    main([*flags, "--max_epochs", "3"])
    resumed = Run()
    assert resumed.folder.name[-8:] == stopped.folder.name[-8:] and resumed.exit_code == [0]
    steps = [row["trainer/global_step"] for row in stopped.rows("train/loss") + resumed.rows("train/loss")]
    assert len(set(steps)) == len(steps) and resumed.rows("test/accuracy")[0]["trainer/global_step"] == 267
    checkpoint = torch.load(resumed.checkpoint(), weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["optimizer_states"][0]["state"][0]["step"] == 267
    assert resumed.last("lr-AdamW") < 0.001  # the schedule ends with the third epoch


def test_a_run_that_broke_is_resumed_bit_for_bit(healthy, monkeypatch):
    def break_in_the_second_epoch(self):
        assert self.current_epoch == 0
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(DigitClassifier, "on_train_epoch_start", break_in_the_second_epoch)
        main(HEALTHY)
    broken = Run()
    assert broken.exit_code == [1]
    main([*HEALTHY, "--ckpt_path", broken.checkpoint()])
    resumed, expected = (torch.load(run.checkpoint(), weights_only=True) for run in (Run(), healthy))
    for name, weight in expected["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight)


def test_a_loss_that_is_not_finite_fails_the_run():
    with pytest.raises(FloatingPointError, match="not finite at step"):
        main([*DIGITS, "--lr", "1e30"])
    assert Run().exit_code == [1]


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        main(["--accelerator", "cpu", *flags])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("train.py: error: ") and not list(Path().glob("wandb"))
    return line


@pytest.mark.parametrize("flags", ["--lr nan", "--batch_size 0", "--max_epochs x", "--devices 0", "--gpus 99",
                                   "--strategy x", "--precision x", "--dataset x", "--unknown"])
def test_a_wrong_flag_gets_one_line(capsys, flags):
    assert flags.split()[0].strip("-s") in refused(capsys, *flags.split()).lower()


def test_a_file_that_is_no_checkpoint_gets_one_line_and_is_not_executed(capsys):
    class Dangerous:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    Path("pickle.ckpt").write_bytes(pickle.dumps(Dangerous()))
    torch.save({"state_dict": Dangerous()}, "dangerous.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, "other.ckpt")
    for name in ("pickle.ckpt", "dangerous.ckpt", "other.ckpt", ".", "missing.ckpt"):
        assert f"--ckpt_path {name} " in refused(capsys, "--ckpt_path", name)
    assert not Path("executed").exists()


def test_two_processes_do_what_one_does(healthy, processes):
    folder, process = list(processes.items())[0]
    assert (process.communicate(timeout=120)[1], process.returncode) == (None, 0)
    tested = Run(folder)
    for key in ("test/examples.captions", "test/hardest.captions", "test/accuracy", "test/recall/3"):
        assert tested.last(key) == healthy.last(key)
    assert tested.last("test/loss") == pytest.approx(healthy.last("test/loss"), rel=1e-4)
    assert tested.confusion("test/confusion_matrix") == healthy.confusion("test/confusion_matrix")
    assert len(list(folder.glob("wandb/*run-2*"))) == 1  # not one a rank


def test_two_processes_stop_together_and_count_each_sample_once(processes):
    folder, process = list(processes.items())[1]
    last_line, stopped = process.communicate(timeout=120)[0].strip().splitlines()[-1], Run(folder)
    assert process.returncode == 143 and stopped.exit_code == [143] and last_line.startswith("Resume it: ")
    assert torch.load(stopped.checkpoint(), weights_only=True)["global_step"] > 60
    assert sum(stopped.confusion().values()) == 5  # a DistributedSampler deals out six


def test_a_tracker_out_of_reach_does_not_stop_the_training(processes):
    folder, process = list(processes.items())[2]
    output, run = process.communicate(timeout=120)[0], Run(folder)
    assert output.count("W&B can't be used online") == 1 and KEY not in output
    assert process.returncode == 0 and run.exit_code == [0] and run.rows("test/hardest.captions")
    assert not any(KEY.encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":  # two processes, five samples without indices, and a signal for the first process
    five = TensorDataset(*load_dataset("digits", "", train=True)[:5][:2], torch.rand(5))
    DigitsDataModule.val_dataloader = lambda self: DataLoader(five, 2)
    DigitClassifier.on_train_batch_start = send(signal.SIGTERM, at_step=60)
    main()
