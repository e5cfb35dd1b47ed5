"""Each test proves a claim of the README on real parts: runs of W&B, signals, processes."""

import json
import multiprocessing
import os
import pickle
import re
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
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.utils import data as torch_data
from torch.utils.data import DataLoader, IterableDataset, StackDataset, Subset, TensorDataset
from torchvision.datasets import MNIST
from wandb.util import get_core_path

import train
from train import DigitClassifier, DigitsDataModule, ImagePredictionLogger, load_dataset, main

DIGITS = ["--dataset", "digits", "--accelerator", "cpu"]
HEALTHY = [*DIGITS, "--max_epochs", "2", "--num_samples", "100", "--batch_size", "16"]
torch.set_num_threads(1)  # other processes share two cores with these tests
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]  # whoever runs the tests may have an account
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    wandb.finish(exit_code=1)
    wandb.teardown()  # it would go on in this folder


class Run:
    """What is on disk of the newest run: its records as `wandb leet inspect` prints them."""

    def __init__(self, folder="."):
        wandb.finish()
        self.folder = Path(folder, "wandb", "latest-run").resolve()
        (file,) = self.folder.glob("*.wandb")
        # What `wandb leet inspect --json` runs, but that would take a second to import W&B again.
        inspect = [get_core_path(), "leet", "inspect", "--json", "--run-file", file, file.parent]
        for _ in range(50):  # a busy W&B may still be writing
            printed = subprocess.run(inspect, capture_output=True).stdout
            if b'"exit_code"' in printed:
                break
        self.records = [json.loads(line) for line in printed.splitlines()]
        self.history = [r["history"]["item"] for r in self.records if r["type"] == "history"]
        self.exit_codes = [r["exit"]["exit_code"] for r in self.records if r["type"] == "exit"]
        artifacts = [r["artifact"] for r in self.records if "artifact" in r]
        self.best_artifacts = [a for a in artifacts if "best" in a.get("aliases", [])]
        updates = [r["config"].get("update", {}) for r in self.records if "config" in r]
        self.config = {key: value for update in updates for key, value in update.items()}

    def rows(self, key):
        return [row for row in self.history if key in row]

    def steps(self, key):
        return [row["trainer/global_step"] for row in self.rows(key)]

    def last(self, key):
        return self.rows(key)[-1][key]

    def samples(self, key):  # [(prediction, confidence, label, index or None)]
        pattern = re.compile(r"Pred: (.+) \((.+)%\), Label: (.+?)(?: \(#(\d+)\))?$")
        parts = [pattern.match(caption).groups() for caption in self.last(f"{key}.captions")]
        return [(p, int(c), label, i if i is None else int(i)) for p, c, label, i in parts]

    def images(self, key):  # [pixels uint8 (H, W) or (H, W, 3)]
        files = [self.folder / "files" / name for name in self.last(f"{key}.filenames")]
        return [np.array(Image.open(file)) for file in files]

    def pictures(self, key):  # {index: pixels}
        indices = [index for _, _, _, index in self.samples(key)]
        return dict(zip(indices, self.images(key), strict=True))

    def confusion(self, key="val/confusion_matrix"):  # {(label, prediction): count}
        table = json.loads((self.folder / "files" / self.last(f"{key}_table.path")).read_text())
        return {(label, prediction): count for label, prediction, count in table["data"]}

    def checkpoint(self, name="last.ckpt"):
        folder = self.folder.parents[1] / "lightning-digits" / self.folder.name[-8:]
        return str(folder / "checkpoints" / name)

    def captions_contradict_accuracy(self):
        right = [prediction == label for prediction, _, label, _ in self.samples("val/examples")]
        return abs(np.mean(right) - self.last("val/accuracy")) > 0.2

    def labelled_5_but_surely_4(self):
        top = self.samples("val/hardest")[:5]
        return sorted(i for prediction, _, label, i in top if (prediction, label) == ("4", "5"))


def digits_of(part):  # images, uint8 (N, 28, 28), and labels of a part of scikit-learn's digits
    generator = torch.Generator().manual_seed(0)
    val = torch_data.random_split(range(1541), [1413, 128], generator)[1].indices
    indices = {"val": val, "test": slice(None)}[part]
    images, labels = load_dataset("digits", "", train=part == "val")[indices]
    return images[:, 0], labels


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Two epochs on scikit-learn's digits, with pictures of 100 of the 128 validation samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("healthy"))
        main([*HEALTHY, "--lr", "0.01"])
        run = Run()
        wandb.teardown()
        return run


def test_fast_dev_run_goes_through_the_callback_and_leaves_no_file(monkeypatch):
    main(["--fast_dev_run", "--precision", "bf16-true"])
    assert list(Path().iterdir()) == []
    monkeypatch.setattr(wandb.plot, "confusion_matrix", None)
    with pytest.raises(TypeError):
        main(["--fast_dev_run"])


def test_a_configured_mode_of_wandb_is_kept(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert train.choose_mode() == "disabled"


def test_a_validation_is_one_row_and_a_healthy_one_raises_no_alarm(healthy, started):
    first, second = healthy.rows("val/examples.captions")  # and none of the sanity check
    keys = {"val/loss", "val/hardest.captions", "val/recall/0", "val/lowest_recall"}
    assert keys <= set(first) and keys <= set(second)
    assert healthy.steps("val/examples.captions") == [88, 177] == healthy.steps("val/loss")
    recalls = [second[f"val/recall/{name}"] for name in "0123456789"]
    assert healthy.last("val/lowest_recall") == pytest.approx(min(recalls)) != 0
    indices = [re.findall(r"#\d+", str(row["val/examples.captions"])) for row in (first, second)]
    assert indices[0] == indices[1] != sorted(indices[0]) and len(set(indices[0])) == 100
    assert healthy.rows("lr-AdamW") and healthy.steps("train/loss") == [*range(9, 178, 10)]
    assert healthy.last("test/accuracy") > 0.95 and healthy.exit_codes == [0]
    assert {"lr": 0.01, "max_epochs": 2, "dataset": "digits"}.items() <= healthy.config.items()
    images, _ = digits_of("val")
    for index, pixels in healthy.pictures("val/examples").items():
        assert (pixels == images[index].numpy()).all()
    assert not healthy.captions_contradict_accuracy() and not healthy.labelled_5_but_surely_4()


def test_panels_show_what_the_best_checkpoint_says_and_it_is_an_artifact(healthy):
    (artifact,) = healthy.best_artifacts
    best = healthy.checkpoint(artifact["manifest"]["contents"][0]["path"])
    losses = [row["val/loss"] for row in healthy.rows("val/loss")]
    assert f"epoch={np.argmin(losses)}-" in best and len(list(Path(best).parent.iterdir())) == 3
    model = DigitClassifier.load_from_checkpoint(best, weights_only=True).eval()
    assert all(weight.is_contiguous() for weight in model.parameters())  # FSDP scrambles others
    images, labels = digits_of("test")
    logits = model((images[:, None] / 255 - train.MEAN) / train.STD)
    confidences, predictions = (logits.softmax(1) * 100).max(1)
    hardest = F.cross_entropy(logits, labels, reduction="none").argsort(descending=True)
    shown = healthy.samples("test/hardest")
    assert [index for *_, index in shown[:20]] == hardest[:20].tolist()
    for prediction, confidence, label, index in shown + healthy.samples("test/examples"):
        assert (int(prediction), int(label)) == (predictions[index], labels[index])
        assert abs(confidence - confidences[index]) < 0.6
    counts = healthy.confusion("test/confusion_matrix")
    for (x, y), count in counts.items():
        assert count == ((labels == int(x)) & (predictions == int(y))).sum()
    assert healthy.last("test/recall/3") == pytest.approx(counts["3", "3"] / int(sum(labels == 3)))


def test_without_mnist_digits_take_its_place_but_damage_is_an_error(monkeypatch, caplog):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    main(["--accelerator", "cpu", "--max_epochs", "1"])
    assert caplog.text.count("MNIST can't be downloaded") == 1
    assert Run().config["dataset"] == "digits" and Path("data/MNIST/raw").exists()  # it was tried
    with pytest.raises(RuntimeError, match="Error downloading"):
        main(["--accelerator", "cpu", "--dataset", "mnist"])
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        Path(f"data/MNIST/raw/{name}-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x1c" * 3 + b"x")
    caplog.clear()
    with pytest.raises(RuntimeError, match="shape .* is invalid"):
        main(["--accelerator", "cpu"])
    assert "MNIST can't" not in caplog.text


def broken_run(monkeypatch, spoil_data=lambda data: None, trained=None):
    """An epoch with spoilt data, or three after those of a trained run."""
    setup = DigitsDataModule.setup

    def setup_and_spoil(self, stage):
        setup(self, stage)
        spoil_data(self)

    monkeypatch.setattr(DigitsDataModule, "setup", setup_and_spoil)
    epochs = ["5", "--ckpt_path", trained.checkpoint()] if trained else ["1"]
    main([*DIGITS, "--num_samples", "100", "--batch_size", "16", "--max_epochs", *epochs])
    return Run()


def test_a_class_that_is_always_wrong_is_a_recall_of_zero(monkeypatch):
    def train_without_fours(data):
        labels = data.train.dataset.tensors[1]
        data.train.indices = [i for i in data.train.indices if labels[i] != 4]

    run = broken_run(monkeypatch, train_without_fours)
    losses = [row["train/loss"] for row in run.rows("train/loss")]
    assert losses[-1] < losses[0] / 5 and run.last("val/accuracy") > 0.8
    assert [name for name in "0123456789" if run.last(f"val/recall/{name}") == 0] == ["4"]


def test_a_wrong_accuracy_is_contradicted_by_the_captions(monkeypatch, healthy):
    log_dict = DigitClassifier.log_dict

    def log_wrong_accuracy(self, metrics, **arguments):
        wrong = {key: value * 0.2 if "accuracy" in key else value for key, value in metrics.items()}
        log_dict(self, wrong, **arguments)

    monkeypatch.setattr(DigitClassifier, "log_dict", log_wrong_accuracy)
    run = broken_run(monkeypatch, trained=healthy)
    assert run.captions_contradict_accuracy()
    assert run.last("val/accuracy") < 0.3 and run.last("val/recall/0") > 0.8


def test_shuffled_labels_cannot_be_learnt_and_do_not_fit_the_pictures(monkeypatch):
    def shuffle_labels(data):
        labels = data.val.dataset.tensors[1]
        labels.copy_(labels[torch.randperm(len(labels))])

    run = broken_run(monkeypatch, shuffle_labels)
    _, true_labels = digits_of("val")
    assert run.last("val/accuracy") < 0.25
    fitting = [int(label) == true_labels[i] for _, _, label, i in run.samples("val/examples")]
    assert np.mean(fitting) < 0.3


def test_flipped_labels_fill_the_top_of_hardest(monkeypatch, healthy):
    fours = (digits_of("val")[1] == 4).nonzero()[:5, 0].tolist()

    def call_five_fours_five(data):
        data.val.dataset.tensors[1][[data.val.indices[index] for index in fours]] = 5

    run = broken_run(monkeypatch, call_five_fours_five, trained=healthy)
    assert run.labelled_5_but_surely_4() == fours


IMAGES, LABELS = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
PAIRS = TensorDataset(IMAGES, LABELS)


def net(classes=3, channels=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))


class Foreign(pl.LightningModule):
    """A module of another project: it logs in training only, and its learning rate is 0."""

    def __init__(self, net, step=lambda module, batch: None):
        super().__init__()
        self.net, self.step = net, step

    def on_validation_epoch_start(self):
        self.seen = []  # (input, label) of each sample, if the step is `see`

    def forward(self, inputs):
        return self.net(inputs / 255 if inputs.dtype == torch.uint8 else inputs)

    def training_step(self, batch, batch_idx):
        self.log("train_loss", float(batch_idx))
        return sum(p.sum() for p in [torch.ones(1, requires_grad=True), *self.parameters()])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.ones(1)), *self.parameters()], lr=0.0)


def fit(module, *datasets, max_epochs=2, flags=None, **arguments):
    """Fits with 24 training samples, in 8 steps an epoch. Returns the run."""
    loaders = [DataLoader(d, 4) if isinstance(d, torch_data.Dataset) else d for d in datasets]
    loaders = loaders[0] if isinstance(loaders[0], CombinedLoader) else loaders
    flags = {"accelerator": "cpu", "max_epochs": max_epochs, **(flags or {})}
    logger = WandbLogger(project="other")
    assert logger.experiment  # before any process is forked
    trainer = pl.Trainer(logger=logger, callbacks=ImagePredictionLogger(4, **arguments), **flags)
    trainer.fit(module, DataLoader(PAIRS, 3), loaders)
    return Run()


@pytest.mark.parametrize("log_every_n_steps", [5, 50])
def test_pictures_are_at_the_steps_of_their_validations(log_every_n_steps):
    run = fit(Foreign(net()), PAIRS, max_epochs=6, flags={"log_every_n_steps": log_every_n_steps})
    assert run.steps("val/hardest.captions") == [7, 15, 23, 31, 39, 47]
    assert run.steps("val/lowest_recall") == run.steps("val/hardest.captions")


def see(module, batch):
    torch.set_grad_enabled(batch[0].requires_grad)
    module.seen += zip(batch[0].detach().clone(), batch[1].flatten().tolist(), strict=True)
    return module.net(batch[0])


def rows(get, **methods):  # a data set of 24 samples
    methods |= {"__len__": lambda data: 24, "__getitem__": lambda data, index: get(index)}
    return type("Rows", (torch_data.Dataset,), methods)()


def hooked(hook):
    return type("Hooked", (Foreign,), {"on_after_batch_transfer": hook})(net(), see)


FLIPPED = rows(lambda i: (IMAGES[i].flip(int(torch.randint(1, 3, (1,)))), LABELS[i]))
FILE = rows(lambda i: torch_data.get_worker_info() and PAIRS[i])  # not for the main process
MANY = rows(None, __getitems__=lambda data, indices: [PAIRS[i] for i in indices])
STREAM = type("Stream", (IterableDataset,), {"__iter__": lambda data: iter(PAIRS)})()
COMBINED = {"b": DataLoader(Subset(PAIRS, range(16)), 4), "a": DataLoader(PAIRS, 4)}
ONE = Foreign(net(), lambda module, batch: see(module, batch["a"]))
LOADERS = {  # loader or its arguments, module, number of samples, whether indices are certain
    "flips": ({"dataset": FLIPPED}, None, 24, True),
    "shuffled": ({"shuffle": True}, None, 24, False),
    "subset": ({"sampler": torch_data.SubsetRandomSampler(range(3, 24))}, None, 21, False),
    "weighted": ({"sampler": torch_data.WeightedRandomSampler([1.0] * 24, 24)}, None, 24, False),
    "distributed": ({"sampler": torch_data.DistributedSampler(PAIRS, 1, 0)}, None, 24, False),
    "stream": ({"dataset": STREAM}, None, 24, False),
    "no batches": ({"dataset": [PAIRS[:9], PAIRS[9:]], "batch_size": None}, None, 24, False),
    "any order": ({"num_workers": 2, "in_order": False}, None, 24, False),
    "dropped": ({"collate_fn": lambda x: torch_data.default_collate(x[1:])}, None, 18, False),
    "__getitems__": ({"dataset": MANY}, None, 24, True),
    "file": ({"dataset": FILE, "num_workers": 2}, None, 24, True),
    "spoilt": ({}, hooked(lambda _, batch, i: [batch[0] * 0.3, batch[1]]), 24, True),
    "gradients": ({}, hooked(lambda _, batch, i: [batch[0].requires_grad_(), batch[1]]), 24, True),
    "scale of 255": ({}, hooked(lambda _, batch, i: [batch[0] * 2 - 1, batch[1]]), 24, True),
    "max_size": (CombinedLoader(COMBINED, "max_size"), ONE, 24, False),
    "min_size": (CombinedLoader(COMBINED, "min_size"), ONE, 16, False),
}


@pytest.mark.parametrize("case", LOADERS)
def test_pictures_are_those_that_were_judged(case):
    loader, module, number, is_certain = LOADERS[case]
    arguments = {"unpack": lambda batch: batch["a"]} if module is ONE else {}
    arguments |= {"mean": [123.675], "std": [58.395]} if case == "scale of 255" else {}
    if isinstance(loader, dict):
        loader = DataLoader(**{"dataset": PAIRS, "batch_size": 4, **loader})
    module = module or Foreign(net(), see)
    run = fit(module, loader, flags={"inference_mode": case != "gradients"}, **arguments)
    assert sum(run.confusion().values()) == number == len(module.seen)
    a, b = (58.395, 123.675) if case == "scale of 255" else (255, 0)
    seen = [((x[0] * a + b).round().numpy(), str(label)) for x, label in module.seen]
    for panel in ("val/hardest", "val/examples"):
        samples = run.samples(panel)
        assert len(samples) == 4 and len(run.rows(f"{panel}.captions")) == 2
        for pixels, (_, _, label, index) in zip(run.images(panel), samples, strict=True):
            (place, *_) = [i for i, (x, y) in enumerate(seen) if (pixels == x).all() and label == y]
            assert index == (place if is_certain else None)


def test_training_goes_on_as_without_the_callback(healthy):
    pl.seed_everything(0, verbose=False)
    model, data = DigitClassifier(lr=0.01), DigitsDataModule("digits", "", batch_size=16)
    pl.Trainer(accelerator="cpu", max_epochs=2, logger=False).fit(model, data)
    weights = torch.load(healthy.checkpoint(), weights_only=True)["state_dict"]
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_texts_and_clips_of_several_loaders_are_shown_by_to_media():
    shown, texts, clips = [], torch.randint(7, (24, 5)), torch.rand(24, 3, 3, 4, 4)
    mean, std = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    normalised = (clips - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    loaders = [TensorDataset(x, LABELS[: len(x)]) for x in (texts[:0], texts, normalised)]
    module = Foreign(None, lambda module, batch: F.one_hot(batch[1], 3) * 5.0)
    arguments = {"mean": mean.tolist(), "std": std.tolist()}
    arguments["to_media"] = lambda x, caption: shown.append(x) or wandb.Html(caption)
    run = fit(module, *loaders, **arguments)
    expected = {*map(str, texts), *map(str, (clips * 255).round().byte())}
    assert shown and {*map(str, shown)} <= expected
    for number in (1, 2):
        assert run.last(f"val/hardest/dataloader_idx_{number}.count") == 4
        assert run.steps(f"val/lowest_recall/dataloader_idx_{number}") == [7, 15]


def test_two_runs_get_images_each():
    os.mkdir("other")
    runs = [wandb.init(dir=name, reinit="create_new") for name in (".", "other")]
    loggers = [WandbLogger(experiment=run) for run in runs]
    trainer = pl.Trainer(accelerator="cpu", logger=loggers, callbacks=ImagePredictionLogger(4))
    trainer.validate(Foreign(net()), DataLoader(PAIRS, 4), verbose=False)
    for run, name in zip(runs, (".", "other"), strict=True):
        run.finish()
        assert len(Run(name).images("val/hardest")) == 4


def test_probabilities_get_one_warning():
    for step in (lambda m, b: m.net(b[0])[:, :1].sigmoid(), lambda m, b: m.net(b[0]).softmax(1)):
        with pytest.warns(UserWarning) as warned:
            fit(Foreign(net(2), step), SIGNS)
        assert len({str(w.message) for w in warned if "probabilities" in str(w.message)}) == 1


DICTS = StackDataset(image=IMAGES, label=LABELS)
SIGNS = TensorDataset(IMAGES, (LABELS > 0).float()[:, None])
PICK = {"unpack": lambda batch: (batch["image"], batch["label"])}
CASES = {  # data set, module, arguments
    "nothing": (PAIRS, Foreign(net()), {}),
    "a third tensor": (TensorDataset(IMAGES, LABELS, torch.arange(24) % 6), Foreign(net()), {}),
    "integers": (PAIRS, Foreign(net(), lambda m, b: torch.stack([b[1], b[1] + 10], 1)), {}),
    "odd": (PAIRS, Foreign(net(), lambda m, b: torch.rand((4, 5, 5) if b[1][0] else (5, 5))), {}),
    "dict": (DICTS, Foreign(net(), lambda m, b: {"logits": m.net(b["image"])}), PICK),
    "one logit": (SIGNS, Foreign(net(1), lambda m, b: m(b[0])), {}),
    "no parameters": (PAIRS, Foreign(nn.Sequential(nn.Flatten(), nn.AvgPool1d(20))), {}),
    "names": (PAIRS, Foreign(net()), {"class_names": np.array(["a", "b", "c"])}),
}
PLANES, ROWS = torch.rand(24, 2, 8, 8), torch.rand(24, 8, 8, 3)
OURS = "^ImagePredictionLogger.*"
ERRORS = [  # data, module, arguments, error and message
    ((IMAGES, IMAGES[:, 0].long()), Foreign(net()), {}, ValueError, OURS + "labels"),
    ((IMAGES, LABELS * 0.7), Foreign(net()), {}, ValueError, OURS + "integer labels"),
    ((IMAGES, LABELS), Foreign(nn.Conv2d(1, 3, 1)), {}, ValueError, OURS + r"\(N, classes\) or"),
    ((IMAGES, LABELS), Foreign(nn.Flatten(2)), {}, ValueError, OURS + r"\(4,\) .*\[4, 1, 64\]"),
    ((IMAGES, LABELS), Foreign(net()), {"class_names": "ab"}, ValueError, OURS + "2 .* for 3"),
    ((PLANES, LABELS), Foreign(net(3, 2)), {}, ValueError, OURS + "to_media"),
    ((IMAGES[:, 0], LABELS), Foreign(net()), {}, ValueError, OURS + "unpack or to_media"),
    ((ROWS, LABELS), Foreign(net(3, 3)), {}, ValueError, OURS + "unpack or to_media"),
    (DICTS, Foreign(net()), {}, ValueError, OURS + "unpack"),
    ((IMAGES, LABELS + 1), Foreign(net()), {}, IndexError, "Target 3 is out of bounds"),
    (DICTS, Foreign(net(), lambda m, batch: batch.pop("label")), PICK, KeyError, "label"),
    ((IMAGES, LABELS), Foreign(None), {}, TypeError, "not callable"),
]


@pytest.mark.parametrize("case", CASES)
def test_other_modules_are_shown_as_they_are(case):
    dataset, module, arguments = CASES[case]
    run = fit(module, dataset, **arguments)
    names = list(arguments.get("class_names", "012"))
    assert sum(run.confusion().values()) == 24 and len(run.rows("val/hardest.captions")) == 2
    logits = module(IMAGES).detach()
    predictions = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    for prediction, _, label, index in run.samples("val/hardest"):
        assert prediction == names[predictions[index]]
        assert label == names[int(dataset[index]["label"] if case == "dict" else dataset[index][1])]
    for index, pixels in run.pictures("val/hardest").items():
        assert (pixels == (IMAGES[index, 0] * 255).round().byte().numpy()).all()


def test_pictures_of_any_type_are_shown_as_they_are():
    ramp = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(24, 1, 1, 1)
    wide = [(ramp * 4095).to(dtype) for dtype in (torch.int16, torch.int32, torch.uint16)]
    kinds = [*wide, ramp * 20 - 10, (ramp * 100).byte(), ramp.bfloat16(), ramp, ramp > 0.5]
    module = Foreign(None, lambda module, batch: F.one_hot(batch[1], 3) * 5.0)
    with pytest.warns(UserWarning, match="rescales"):
        run = fit(module, *[TensorDataset(images, LABELS) for images in kinds])
    for number, expected in enumerate([ramp] * 4 + [ramp / 2.55] + [ramp] * 2 + [ramp > 0.5]):
        key = f"val/hardest/dataloader_idx_{number}"
        for index, pixels in run.pictures(key).items():
            assert abs(expected[index, 0].float().numpy() * 255 - pixels).max() < 2


@pytest.mark.parametrize("number", [100, 1000])
def test_many_classes_of_which_two_have_one_name(number):
    names = ["crane", *map(str, range(number - 2)), "crane"]
    module = Foreign(None, lambda module, batch: F.one_hot(batch[1], number) * 9.0)
    run = fit(module, TensorDataset(IMAGES, LABELS % 2 * (number - 1)), class_names=names)
    cranes = {"crane (0)", f"crane ({number - 1})"}
    assert {label for _, _, label, _ in run.samples("val/examples")} <= cranes
    recalls = {key for key in run.rows("val/lowest_recall")[-1] if key.startswith("val/recall/")}
    assert recalls == ({f"val/recall/{name}" for name in cranes} if number == 100 else set())
    assert bool(run.rows("val/confusion_matrix_table.path")) == (number == 100)


def test_samples_without_a_label_are_left_out_and_nan_is_the_hardest():
    images, labels = IMAGES.clone(), LABELS.clone()
    images[7] = torch.nan
    labels[3], labels[4] = -1, -100
    run = fit(Foreign(net()), TensorDataset(images, labels))
    assert sum(run.confusion().values()) == 22
    assert re.match(r"Pred: .* \(nan%\), .* \(#7\)", run.last("val/hardest.captions")[0])


def test_half_precision_without_logits_from_the_step_and_without_wandb():
    flags = {"precision": "bf16-true", "logger": False, "callbacks": ImagePredictionLogger(4)}
    trainer = pl.Trainer(accelerator="cpu", **flags)
    loader = DataLoader(TensorDataset((IMAGES * 255).byte(), LABELS), 4)
    with pytest.warns(UserWarning, match="no WandbLogger"):
        (metrics,) = trainer.validate(Foreign(net()), loader, verbose=False)
    assert 0 <= metrics["val/lowest_recall"] <= 1


@pytest.mark.parametrize("data, module, arguments, error, message", ERRORS)
def test_what_cannot_be_shown_is_one_error(data, module, arguments, error, message):
    with pytest.raises(error, match=message):
        fit(module, data if data is DICTS else TensorDataset(*data), **arguments)


def test_two_processes_count_each_sample_once_and_do_not_wait_for_ever():
    class Gathering(Foreign):
        def on_validation_epoch_end(self):
            self.all_gather(torch.zeros(1))
            self.log("rank", float(self.global_rank), sync_dist=True)

    loader = DataLoader(TensorDataset(IMAGES[:5], LABELS[:5]), 2)
    two = {"devices": 2, "strategy": "ddp_fork"}
    run = fit(Gathering(net()), loader, flags=two)
    assert sum(run.confusion().values()) == 5 and run.last("rank") == 0.5
    assert pickle.loads(pickle.dumps(ImagePredictionLogger(5))).num_samples == 5  # as in ddp_spawn
    for index, pixels in run.pictures("val/hardest").items():
        assert (pixels == (IMAGES[index, 0] * 255).round().byte().numpy()).all()
    run = fit(Foreign(net()), loader, flags={**two, "use_distributed_sampler": False})
    assert sum(run.confusion().values()) == 10  # each process may have had a file of its own


def test_two_processes_test_as_one_does(healthy):
    two = ["--devices", "2", "--strategy", "ddp_fork", "--batch_size", "100"]
    main([*HEALTHY, *two, "--ckpt_path", healthy.checkpoint()])
    run = Run()
    assert len(list(Path("wandb").glob("*run-2*"))) == 1  # not one for each process
    indices = [index for *_, index in run.samples("test/examples")]  # of both processes
    assert len(set(indices)) == 100 and 60 < len({index // 2 for index in indices}) < 100
    for key in ("hardest.captions", "accuracy", "recall/3", "lowest_recall"):
        assert run.last(f"test/{key}") == healthy.last(f"test/{key}")
    assert run.last("test/loss") == pytest.approx(healthy.last("test/loss"), rel=1e-4)
    assert run.confusion("test/confusion_matrix") == healthy.confusion("test/confusion_matrix")


EVENTS = ["SIGTERM train 1", "SIGTERM sanity 1", "SIGTERM test 1", "SIGTERM train 2", "nan train 2"]
EVENTS += ["SIGINT train 1", "SIGINT test 1", "nothing train 1"]
KEY = "0123456789abcdef" * 2 + "01234567"
SERVER = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}


def main_with_event(what):
    """An epoch of four steps in which something happens."""
    event, when, devices = what.split()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    DigitsDataModule.train_dataloader = lambda data: DataLoader(Subset(data.train, range(400)), 100)

    def happen(module, *_):
        if event == "nan":
            module.network[0].weight.data.fill_(torch.nan)
        elif event != "nothing" and module.global_rank == 0:
            os.kill(os.getpid(), signal.Signals[event])

    hooks = {"train": "on_before_optimizer_step", "sanity": "on_validation_start"}
    setattr(DigitClassifier, hooks.get(when, "on_test_start"), happen)
    main([*DIGITS, "--max_epochs", "1", "--devices", devices])


def run_in(folder, what):  # in a forked process, which need not import PyTorch again
    os.chdir(folder)
    os.environ |= {"WANDB_SILENT": "false", **(SERVER if what.startswith("nothing") else {})}
    os.environ["MASTER_PORT"] = str(20_000 + os.getpid() % 9_999)  # not the same for two runs
    sys.stdout = sys.stderr = open("output", "w", buffering=1)  # noqa: SIM115
    if what.endswith("1"):
        main_with_event(what)
        return wandb.finish()  # as at the exit of a process that isn't forked
    command = [sys.executable, __file__, what]  # which Lightning starts again for the second
    sys.exit(subprocess.run(command, stdout=sys.stdout, stderr=sys.stdout).returncode)


@pytest.fixture(scope="module")
def started(tmp_path_factory):  # {what: (process, folder)} of processes beside the other tests
    folders = {what: tmp_path_factory.mktemp("started") for what in EVENTS}
    process = multiprocessing.get_context("fork").Process
    processes = {what: process(target=run_in, args=(folders[what], what)) for what in EVENTS}
    for process in processes.values():
        process.start()
    return {what: (processes[what], folders[what]) for what in EVENTS}


@pytest.mark.parametrize("what", EVENTS)
def test_a_run_that_is_stopped_or_diverges_is_not_called_finished(what, started):
    process, folder = started[what]
    process.join(timeout=120)
    run, output = Run(folder), (folder / "output").read_text()
    status = {"SIGTERM": 143, "nothing": 0}.get(what.split()[0], 1)
    assert (process.exitcode, run.exit_codes) == (status, [min(status, 1)]), output
    if status == 0:  # and W&B's server can't be reached
        assert output.count("syncing is set to `offline`") == 1
        assert not any(KEY.encode() in f.read_bytes() for f in folder.rglob("*") if f.is_file())
    assert ("Checkpoint: " in output) == bool(run.rows("test/hardest.captions")) == (status == 0)
    assert "nan" not in what or "loss is not finite" in output.strip().splitlines()[-1]
    assert status == 0 or not run.best_artifacts


def test_a_resumed_run_does_all_epochs_and_does_not_raise_the_learning_rate(monkeypatch, healthy):
    def spoil_weights(module):
        module.network[0].weight.data *= module.current_epoch < 4

    monkeypatch.setattr(DigitClassifier, "on_train_epoch_start", spoil_weights)
    run = broken_run(monkeypatch, trained=healthy)  # whose schedule has come to its end
    assert max(row["lr-AdamW"] for row in run.rows("lr-AdamW")) == 0
    assert torch.load(run.checkpoint(), weights_only=True)["epoch"] == 4
    assert run.last("val/accuracy") < 0.5 < 0.95 < run.last("test/accuracy")  # of the best epoch


WRONG = {  # flags, end of the last line
    "--lr nan": "Invalid learning rate: nan",
    "--batch_size 0": "batch_size should be a positive integer value, but got batch_size=0",
    "--max_epochs -1": "--max_epochs, --num_nodes and --num_samples must be positive",
    "--num_samples 0": "--max_epochs, --num_nodes and --num_samples must be positive",
    "--devices 0": "`Trainer(devices='0')` value is not a valid input",
    "--gpus 99": "No supported gpu backend found!",
    "--strategy x": "invalid strategy name: `strategy='x'`",
    "--dataset x": "argument --dataset: invalid choice: 'x'",
    "--project a/b": "cannot contain characters",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_an_error_that_says_so(capsys, flags):
    with pytest.raises(BaseException) as stop:  # noqa: B017, PT011
        main([*DIGITS, "--max_epochs", "1", *flags.split()])
    message = capsys.readouterr().err if stop.value.args == (2,) else str(stop.value)
    assert WRONG[flags] in message.splitlines()[-1] and not list(Path().glob("*/*/checkpoints/*"))


def test_a_file_that_is_no_checkpoint_is_an_error_and_is_not_executed():
    class Dangerous:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    Path("pickle.ckpt").write_bytes(pickle.dumps(Dangerous()))
    torch.save({"state_dict": Dangerous()}, "dangerous.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, "other.ckpt")
    for name in ("pickle.ckpt", "dangerous.ckpt", "other.ckpt", ".", "missing.ckpt"):
        with pytest.raises((pickle.UnpicklingError, OSError, KeyError)):
            main([*DIGITS, "--ckpt_path", name])
    assert not Path("executed").exists()


if __name__ == "__main__":
    main_with_event(sys.argv[1])
