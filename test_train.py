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
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset, TensorDataset
from torchvision.datasets import MNIST
from wandb.util import get_core_path

import train
from train import DigitClassifier, DigitsDataModule, ImagePredictionLogger, load_dataset, main

DIGITS = ["--dataset", "digits", "--accelerator", "cpu"]
HEALTHY = [*DIGITS, "--max_epochs", "2", "--num_samples", "100"]
HEALTHY += ["--batch_size", "16", "--lr", "0.01"]
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
        self.folder = sorted(Path(folder).absolute().glob("wandb/*run-2*"))[-1]
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

    def samples(self, key):
        """[(prediction, confidence, label, index)]"""
        pattern = re.compile(r"Pred: (.+) \((.+)%\), Label: (.+) \(#(\d+)\)$")
        parts = [pattern.match(caption).groups() for caption in self.last(f"{key}.captions")]
        return [(prediction, int(c), label, int(index)) for prediction, c, label, index in parts]

    def pictures(self, key):
        """{index: pixels uint8 (H, W) or (H, W, 3)}"""
        files = [self.folder / "files" / name for name in self.last(f"{key}.filenames")]
        indices = [index for _, _, _, index in self.samples(key)]
        return {i: np.array(Image.open(file)) for i, file in zip(indices, files, strict=True)}

    def confusion(self, key="val/confusion_matrix"):
        """{(label, prediction): count}"""
        table = json.loads((self.folder / "files" / self.last(f"{key}_table.path")).read_text())
        return {(label, prediction): count for label, prediction, count in table["data"]}

    def checkpoint(self, pattern="last.ckpt"):
        folder = self.folder.parents[1] / "lightning-digits" / self.folder.name[-8:]
        return str(next(folder.glob(f"checkpoints/{pattern}")))

    def classes_always_wrong(self):
        return [name for name in "0123456789" if self.last(f"val/recall/{name}") == 0]

    def captions_contradict_accuracy(self):
        right = [prediction == label for prediction, _, label, _ in self.samples("val/examples")]
        return abs(np.mean(right) - self.last("val/accuracy")) > 0.2

    def labelled_5_but_surely_4(self):
        top = self.samples("val/hardest")[:5]
        return sorted(i for prediction, _, label, i in top if (prediction, label) == ("4", "5"))


def digits_of(part):
    """The images, uint8 (N, 28, 28), and labels of a part of scikit-learn's digits."""
    generator = torch.Generator().manual_seed(0)
    data = load_dataset("digits", "", train=True)
    parts = torch.utils.data.random_split(data, [1413, 128, 256], generator)
    images, labels = data[parts[["train", "val", "test"].index(part)].indices]
    return images[:, 0], labels


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Two epochs on scikit-learn's digits, with pictures of 100 of the 128 validation samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("healthy"))
        main(HEALTHY)
        run = Run()
        wandb.teardown()
        return run


def test_fast_dev_run_goes_through_the_callback_and_leaves_no_file(monkeypatch):
    main(["--fast_dev_run", "--precision", "bf16-true"])
    assert list(Path().iterdir()) == []
    monkeypatch.setattr(wandb.plot, "confusion_matrix", None)
    with pytest.raises(TypeError):
        main(["--fast_dev_run"])


def test_a_validation_is_one_row_and_a_healthy_one_raises_no_alarm(healthy, started):
    first, second = healthy.rows("val/examples.captions")  # and none of the sanity check
    keys = {"val/loss", "val/hardest.captions", "val/recall/0", "val/lowest_recall"}
    assert keys <= set(first) and keys <= set(second)
    assert healthy.steps("val/examples.captions") == [88, 177] == healthy.steps("val/loss")
    recalls = [second[f"val/recall/{name}"] for name in "0123456789"]
    assert healthy.last("val/lowest_recall") == pytest.approx(min(recalls))
    indices = [re.findall(r"#\d+", str(row["val/examples.captions"])) for row in (first, second)]
    assert indices[0] == indices[1] != sorted(indices[0]) and len(set(indices[0])) == 100
    assert healthy.rows("lr-AdamW") and healthy.steps("train/accuracy") == [*range(9, 178, 10)]
    assert healthy.last("test/accuracy") > 0.95 and healthy.exit_codes == [0]
    assert {"lr": 0.01, "max_epochs": 2, "dataset": "digits"}.items() <= healthy.config.items()
    images, _ = digits_of("val")
    for index, pixels in healthy.pictures("val/examples").items():
        assert (pixels == images[index].numpy()).all()
    assert not healthy.captions_contradict_accuracy() and not healthy.labelled_5_but_surely_4()
    assert not healthy.classes_always_wrong()


def test_panels_show_what_the_best_checkpoint_says_and_it_is_an_artifact(healthy):
    best = healthy.checkpoint("epoch*")
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
    pairs = list(zip(labels.tolist(), predictions.tolist(), strict=True))
    assert all(count == pairs.count((int(x), int(y))) for (x, y), count in counts.items())
    assert healthy.last("test/recall/3") == pytest.approx(counts["3", "3"] / int(sum(labels == 3)))
    (artifact,) = healthy.best_artifacts
    assert artifact["manifest"]["contents"][0]["path"] == Path(best).name


def test_without_mnist_digits_take_its_place_but_damage_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    data = DigitsDataModule(None, "data", 128)
    trainer = pl.Trainer(accelerator="cpu", logger=WandbLogger())
    for _ in range(2):
        trainer.validate(DigitClassifier(), data, verbose=False)
    assert capsys.readouterr().out.count("MNIST can't be downloaded") == 1
    assert Run().config["dataset"] == "digits" and Path("data/MNIST/raw").exists()  # it was tried
    with pytest.raises(RuntimeError, match="Error downloading"):
        main(["--accelerator", "cpu", "--dataset", "mnist"])
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        Path(f"data/MNIST/raw/{name}-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x1c" * 3 + b"x")
    with pytest.raises(RuntimeError, match="shape .* is invalid"):
        main(["--accelerator", "cpu"])
    assert "MNIST can't" not in capsys.readouterr().out


def broken_run(monkeypatch, spoil_data=lambda data: None, trained=None):
    """An epoch with spoilt data, or, after a trained run's, some with larger batches."""
    setup = DigitsDataModule.setup

    def setup_and_spoil(self, stage):
        setup(self, stage)
        spoil_data(self)

    monkeypatch.setattr(DigitsDataModule, "setup", setup_and_spoil)
    start = ["--max_epochs", "1", "--batch_size", "16"]
    if trained:
        start = ["--max_epochs", "5", "--ckpt_path", trained.checkpoint()]
    main([*DIGITS, "--num_samples", "100", *start])
    return Run()


def test_a_class_that_is_always_wrong_is_a_recall_of_zero(monkeypatch):
    def train_without_fours(data):
        labels = data.train.dataset.tensors[1]
        data.train.indices = [i for i in data.train.indices if labels[i] != 4]

    run = broken_run(monkeypatch, train_without_fours)
    losses = [row["train/loss"] for row in run.rows("train/loss")]
    assert losses[-1] < losses[0] / 5 and run.last("val/accuracy") > 0.8
    assert run.classes_always_wrong() == ["4"] and run.last("val/lowest_recall") == 0
    assert not any(count for (_, prediction), count in run.confusion().items() if prediction == "4")


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


class Strict(TensorDataset):
    def __getitem__(self, index):
        assert isinstance(index, int)  # random.Random(index), for example, takes no np.int64
        return super().__getitem__(index)


IMAGES, LABELS = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
PAIRS = Strict(IMAGES, LABELS)


def net(classes=3, channels=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))


class Foreign(pl.LightningModule):
    """A module of another project: it logs in training only, and its learning rate is 0."""

    def __init__(self, net, step=lambda module, batch: None):
        super().__init__()
        self.net, self.step = net, step

    def forward(self, inputs):
        return self.net(inputs / 255 if inputs.dtype == torch.uint8 else inputs)

    def training_step(self, batch, batch_idx):
        self.log("train_loss", float(batch_idx))
        return sum(p.sum() for p in [torch.ones(1, requires_grad=True), *self.parameters()])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.ones(1)), *self.parameters()], lr=0.0)


def fit(module, *datasets, callbacks=(), max_epochs=2, flags=None, **arguments):
    """Fits with 24 training samples, in 8 steps an epoch. Returns the run."""
    loaders = [d if isinstance(d, DataLoader) else DataLoader(d, 4) for d in datasets]
    common = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": max_epochs}
    callbacks = [*callbacks, ImagePredictionLogger(4, **arguments)]
    logger = WandbLogger(project="other")
    assert logger.experiment  # before any process is forked
    trainer = pl.Trainer(logger=logger, callbacks=callbacks, **common, **flags or {})
    trainer.fit(module, DataLoader(PAIRS, 3), loaders)
    return Run()


@pytest.mark.parametrize("spoil", [torch.zeros_like, lambda x: x.mT, lambda x: x * 2 - 1])
@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_a_picture_shows_what_the_step_really_got(hook, spoil):
    hooks = {hook: lambda module, batch, dataloader_idx: [spoil(batch[0]), batch[1]]}
    run = fit(type("Spoiling", (Foreign,), hooks)(net()), PAIRS, mean=[0.4], std=[0.2])
    for index, pixels in run.pictures("val/examples").items():
        expected = (spoil(IMAGES[index, 0]) * 0.2 + 0.4).clamp(0, 1) * 255
        assert (pixels == expected.round().numpy()).all()


@pytest.mark.parametrize("log_every_n_steps", [5, 50])
def test_pictures_are_at_the_steps_of_their_validations(log_every_n_steps):
    run = fit(Foreign(net()), PAIRS, max_epochs=6, flags={"log_every_n_steps": log_every_n_steps})
    assert run.steps("val/hardest.captions") == [7, 15, 23, 31, 39, 47]
    assert run.steps("val/lowest_recall") == run.steps("val/hardest.captions")


DICTS = torch.utils.data.StackDataset(image=IMAGES, label=LABELS)
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
ERRORS = [  # data set, module, arguments, message
    (TensorDataset(IMAGES, IMAGES[:, 0].long()), Foreign(net()), {}, "labels"),
    (TensorDataset(IMAGES, LABELS + 1), Foreign(net()), {}, "Target 3 is out of bounds"),
    (TensorDataset(IMAGES, LABELS * 0.7), Foreign(net()), {}, "labels must be integers"),
    (PAIRS, Foreign(nn.Conv2d(1, 3, 1)), {}, "logits"),
    (PAIRS, Foreign(nn.Sequential(net(1), nn.Flatten(0))), {}, r"\(N, classes\) or \(N, 1\)"),
    (PAIRS, Foreign(None), {}, "logits .* from the step"),
    (PAIRS, Foreign(None, lambda m, b: net()(b[0]).softmax(1)), {}, "logits.*probabilities"),
    (PAIRS, Foreign(net()), {"class_names": ["a", "b"]}, "2 class_names for 3 classes"),
    (DICTS, Foreign(net()), {}, "unpack"),
    (DICTS, Foreign(net(), lambda m, batch: batch.pop("label")), PICK, "labels .*'label'"),
    (TensorDataset(torch.rand(24, 2, 8, 8), LABELS), Foreign(net(3, 2)), {}, "needs to_media"),
    (DataLoader(PAIRS, 4, shuffle=True), Foreign(net()), {}, "shuffle"),
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
        key = f"val/hardest/dataloader_idx_{number}" if number else "val/hardest"
        for index, pixels in run.pictures(key).items():
            assert abs(expected[index, 0].float().numpy() * 255 - pixels).max() < 2


def test_texts_of_two_loaders_are_shown_by_to_media():
    texts = TensorDataset(torch.randint(7, (24, 5)), LABELS)
    empty = TensorDataset(torch.zeros(0, 5), torch.zeros(0))
    module, show = Foreign(nn.EmbeddingBag(7, 3)), lambda text, caption: wandb.Html(caption)
    run = fit(module, empty, texts, texts, to_media=show)
    for number in (1, 2):
        assert run.last(f"val/hardest/dataloader_idx_{number}.count") == 4
        assert run.steps(f"val/lowest_recall/dataloader_idx_{number}") == [7, 15]
    assert any("Pred: " in page.read_text() for page in run.folder.rglob("*.html"))


def test_a_thousand_classes_of_which_two_have_one_name():
    names = ["crane", *map(str, range(998)), "crane"]
    module = Foreign(None, lambda module, batch: F.one_hot(batch[1], 1000) * 9.0)
    run = fit(module, TensorDataset(IMAGES, torch.tensor([0, 999] * 12)), class_names=names)
    assert run.last("val/recall/crane (0)") == run.last("val/recall/crane (999)") == 1
    assert not run.rows("val/confusion_matrix_table.path")


def test_samples_without_a_label_are_left_out_and_nan_is_the_hardest():
    images, labels = IMAGES.clone(), LABELS.clone()
    images[7] = torch.nan
    labels[3], labels[4] = -1, -100
    run = fit(Foreign(net()), TensorDataset(images, labels))
    assert sum(run.confusion().values()) == 22
    assert re.match(r"Pred: .* \(nan%\), .* \(#7\)", run.last("val/hardest.captions")[0])


def test_an_iterable_data_set_has_recalls_but_no_pictures():
    class Stream(IterableDataset):
        def __iter__(self):
            return zip(IMAGES, LABELS, strict=True)

    with pytest.warns(UserWarning, match="no images"):
        run = fit(Foreign(net()), Stream())
    assert sum(run.confusion().values()) == 24 and len(run.rows("val/lowest_recall")) == 2
    assert not run.rows("val/hardest.captions")


def test_half_precision_without_logits_from_the_step_and_without_wandb():
    half = {"precision": "bf16-true", "callbacks": ImagePredictionLogger(4)}
    trainer = pl.Trainer(accelerator="cpu", logger=False, **half)
    loader = DataLoader(TensorDataset((IMAGES * 255).byte(), LABELS), 4)
    with pytest.warns(UserWarning, match="no WandbLogger"):
        (metrics,) = trainer.validate(Foreign(net()), loader, verbose=False)
    assert 0 <= metrics["val/lowest_recall"] <= 1


@pytest.mark.parametrize("dataset, module, arguments, message", ERRORS)
def test_what_cannot_be_shown_is_one_error(dataset, module, arguments, message):
    with pytest.raises(ValueError, match=f"^ImagePredictionLogger.*{message}"):
        fit(module, dataset, **arguments)


def test_two_processes_count_each_sample_once_and_do_not_wait_for_ever():
    class Logging(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            module.log("rank", float(trainer.global_rank), sync_dist=True)

    class Gathering(Foreign):
        def on_validation_epoch_end(self):
            self.all_gather(torch.zeros(1))

    five, pairwise = TensorDataset(IMAGES[:5], LABELS[:5]), type("Pairwise", (BatchSampler,), {})
    loader = DataLoader(five, batch_sampler=pairwise(range(5), batch_size=2, drop_last=False))
    two = {"devices": 2, "strategy": "ddp_fork"}
    run = fit(Gathering(net()), loader, flags=two, callbacks=[Logging()])
    assert sum(run.confusion().values()) == 5 and run.last("rank") == 0.5
    assert pickle.loads(pickle.dumps(ImagePredictionLogger(5))).num_samples == 5  # as in ddp_spawn
    for index, pixels in run.pictures("val/hardest").items():
        assert (pixels == (IMAGES[index, 0] * 255).round().byte().numpy()).all()


def test_two_processes_test_as_one_does(healthy):
    two = ["--devices", "2", "--strategy", "ddp_fork", "--batch_size", "100"]
    main([*HEALTHY, *two, "--ckpt_path", healthy.checkpoint()])
    run = Run()
    assert len(list(Path("wandb").glob("*run-2*"))) == 1  # not one for each process
    for key in ("examples.captions", "hardest.captions", "accuracy", "recall/3", "lowest_recall"):
        assert run.last(f"test/{key}") == healthy.last(f"test/{key}")
    assert run.last("test/loss") == pytest.approx(healthy.last("test/loss"), rel=1e-4)
    assert run.confusion("test/confusion_matrix") == healthy.confusion("test/confusion_matrix")


EVENTS = ["SIGTERM train 1", "SIGTERM sanity 1", "SIGTERM test 1", "SIGTERM train 2"]
EVENTS += ["SIGINT train 1", "SIGINT test 1", "nan train 2", "nothing train 1"]
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


def run_in(folder, what):
    """In a forked process, which need not import PyTorch again."""
    os.chdir(folder)
    os.environ |= {"WANDB_SILENT": "false", **(SERVER if what.startswith("nothing") else {})}
    os.environ["MASTER_PORT"] = str(20_000 + os.getpid() % 9_999)  # not the same for two runs
    sys.stdout = sys.stderr = open("output", "w", buffering=1)  # noqa: SIM115
    if what.endswith("1"):
        return main_with_event(what)
    command = [sys.executable, __file__, what]  # which Lightning starts again for the second
    sys.exit(subprocess.run(command, stdout=sys.stdout, stderr=sys.stdout).returncode)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """{what: (process, folder)} of processes beside the other tests."""
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
    run = broken_run(monkeypatch, trained=healthy)  # its epochs have fewer steps than were done
    assert max(row["lr-AdamW"] for row in run.rows("lr-AdamW")) == 0
    assert torch.load(run.checkpoint(), weights_only=True)["epoch"] == 4
    assert run.last("test/accuracy") > 0.95


WRONG = "--lr nan, --lr 0, --lr x, --batch_size 0, --max_epochs x, --num_nodes 0, --num_samples -1"
MORE = "--devices 0, --gpus 99, --strategy x, --precision x, --dataset x, --unknown, --project a/b"


@pytest.mark.parametrize("flags", f"{WRONG}, {MORE}".split(", "))
def test_a_wrong_flag_gets_one_line(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(["--accelerator", "cpu", *flags.split()])
    printed = capsys.readouterr().err
    line = printed.splitlines()[-1]
    assert stop.value.code == 2 and ": error: " in line and "usage" not in printed
    assert flags.split()[0].strip("-s") in line.lower() and not list(Path().glob("wandb/*run-2*"))


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
        wandb.finish(exit_code=1)
    assert not Path("executed").exists()


if __name__ == "__main__":
    main_with_event(sys.argv[1])
