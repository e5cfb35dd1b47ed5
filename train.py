"""Trains a CNN on digits with PyTorch Lightning, and shows its mistakes in Weights & Biases."""

import gc
import math
import os
import signal
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import wandb
from pytorch_lightning.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split
from torchvision.datasets import KMNIST, MNIST, FashionMNIST
from torchvision.transforms import RandomCrop

DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "kmnist": KMNIST}
CLASS_NAMES = {"fashion-mnist": FashionMNIST.classes, "kmnist": KMNIST.classes}
MEAN, STD = 0.1307, 0.3081  # mean and std of MNIST's pixels, scaled to [0, 1]


def load_dataset(name: str, data_dir: str, train: bool) -> TensorDataset:
    """Returns images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""
    if name == "digits":  # scikit-learn ships 1,797 of them, with 8 x 8 pixels from 0 to 16
        from sklearn.datasets import load_digits

        pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
        images = F.interpolate(pixels.view(-1, 1, 8, 8) * (255 / 16), size=28, mode="bilinear")
        return TensorDataset(images.round().byte(), labels)
    dataset = DATASETS[name](data_dir, train)
    return TensorDataset(dataset.data[:, None], dataset.targets)


class DigitsDataModule(pl.LightningDataModule):
    """Batches of normalised images, float (N, 1, 28, 28), and labels, int64 (N,)."""

    def __init__(self, dataset: str | None, data_dir: str, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        """Downloads the data set. Lightning calls this in one process on each machine."""
        if self.hparams.dataset in DATASETS:
            DATASETS[self.hparams.dataset](self.hparams.data_dir, download=True)
        elif self.hparams.dataset is None:
            with suppress(RuntimeError, OSError):  # if this fails, `setup` uses other digits
                MNIST(self.hparams.data_dir, download=True)

    def setup(self, stage: str) -> None:
        """Splits the data in the same way every time."""
        name = self.hparams.dataset
        if name is None:
            file = f"{self.hparams.data_dir}/MNIST/raw/t10k-labels-idx1-ubyte"  # the last file
            name = self.trainer.strategy.broadcast("mnist" if os.path.exists(file) else "digits")
            if name == "digits":
                self.trainer.print("MNIST can't be downloaded; using scikit-learn's digits.")
            self.save_hyperparameters({"dataset": name})  # updates hparams, also in W&B
        data = load_dataset(name, self.hparams.data_dir, train=True)
        generator = torch.Generator().manual_seed(0)
        if name == "digits":
            self.train, self.val, self.test = random_split(data, [1413, 128, 256], generator)
        else:
            self.train, self.val = random_split(data, [55_000, 5_000], generator)
            self.test = load_dataset(name, self.hparams.data_dir, train=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.hparams.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.hparams.batch_size)

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """On the device, normalises images and, in training, shifts them at random."""
        images, labels = batch
        if self.trainer.training:
            images = RandomCrop(28, padding=1)(images)  # one shift for the whole batch
        images = (images / 255 - MEAN) / STD
        # Lightning converts floats, e.g. to half, before this hook, but these were uint8 then.
        return [self.trainer.precision_plugin.convert_input(images), labels]


class DigitClassifier(pl.LightningModule):
    """A small LeNet-style CNN, with batch normalisation."""

    def __init__(self, lr: float = 0.015) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 128, 3, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * 3 * 3, 10),  # 28 x 28 pixels have become 3 x 3
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Takes normalised images, float (N, 1, 28, 28). Returns logits, float (N, 10)."""
        images = images.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.compute_and_log("train", batch)["loss"]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.compute_and_log("val", batch)["logits"]  # for ImagePredictionLogger

    def test_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.compute_and_log("test", batch)["logits"]

    def compute_and_log(self, stage: str, batch: list[Tensor]) -> dict[str, Tensor]:
        """Returns the loss and the logits, and logs the loss and the accuracy."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        metrics = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        # Lightning sends every tenth training step to W&B. Logging the others wastes 2 ms each.
        if stage != "train" or (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log_dict(metrics, prog_bar=True, sync_dist=True)  # the mean over all devices
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self) -> dict:
        """AdamW, with a learning rate that falls linearly to zero."""
        lr = self.hparams.lr
        optimizer = torch.optim.AdamW(self.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.05)
        num_steps = self.trainer.estimated_stepping_batches
        # After a run is resumed with larger batches, t can exceed num_steps.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(1 - t / num_steps, 0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(eq=False)  # eq=True would make it unhashable, and Lightning hashes callbacks
class ImagePredictionLogger(pl.Callback):
    """Shows in Weights & Biases what a classifier gets wrong, after each validation or test epoch.

    It logs the images with the highest loss ("hardest"), a fixed random selection ("examples"), the
    recall of each class, the lowest recall and, for up to 100 classes, a confusion matrix.

    Batches must begin with inputs (N, ...) and integer labels (N,); negative labels are ignored.
    Steps should return logits or {"logits": logits}, as float (N, classes) or, for two classes,
    (N, 1). If they return anything else, `module(inputs)` is called. Loaders must not shuffle,
    because images are loaded again by index. Raises ValueError if it notices a broken rule.
    """

    num_samples: int = 32  # images per panel; W&B shows up to 108
    class_names: Sequence[str] | None = None  # one per class; by default, classes are numbered
    mean: Sequence[float] | None = None  # of each channel, as given to Normalize
    std: Sequence[float] | None = None  # if mean and std are given, Normalize is undone
    unpack: Callable | None = None  # for other batches: unpack(batch) returns (inputs, labels)
    to_media: Callable | None = None  # to_media(image, caption=...) replaces wandb.Image

    def on_validation_epoch_start(self, trainer, module):
        self.judged = {}  # {dataloader_idx: [a (5, N) tensor for each batch: see `judge`]}

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        try:
            inputs, labels = self.split_batch(batch)
            logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
            is_float = isinstance(logits, Tensor) and logits.is_floating_point()
            has_logits = is_float and logits.ndim == 2 and len(logits) == len(labels)
            if not has_logits:  # the step returned something else, e.g. a loss or None
                with trainer.precision_plugin.val_step_context():  # e.g. autocast, as in the step
                    logits = module(inputs)
            self.judged.setdefault(dataloader_idx, []).append(self.judge(logits.float(), labels))
        except Exception as error:
            needs = "labels (N,) from batch or unpack, logits (N, classes) or (N, 1) from the step"
            raise ValueError(f"ImagePredictionLogger needs {needs}, but: {error!r}") from error

    def on_validation_epoch_end(self, trainer, module):
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loaders = CombinedLoader(loaders).flattened  # one loader, a list or a dict becomes a list
        for dataloader_idx, loader in enumerate(loaders):
            rows = self.make_rows(loader, self.judged.pop(dataloader_idx, []))
            rows = self.gather_rows(trainer, rows)
            if len(rows) > 0:
                self.log_panels(trainer, module, loader, dataloader_idx, rows)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def split_batch(self, batch) -> tuple:
        """Returns inputs (N, ...) and labels, int64 (N,). Every negative label becomes -1."""
        inputs, labels = self.unpack(batch) if self.unpack else batch[:2]
        if labels.is_floating_point() and (labels != labels.round()).any():
            raise ValueError("labels must be integers")
        return inputs, labels.reshape(len(labels)).long().clamp(min=-1)  # (N, 1) becomes (N,)

    def judge(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns label, prediction, confidence, loss and sums_to_one of each sample, (5, N)."""
        if logits.shape[1] == 1:
            logits = F.pad(logits, (1, 0))  # to [0, x], since softmax([0, x])[1] is sigmoid(x)
        if self.class_names is not None and len(self.class_names) != logits.shape[1]:
            raise ValueError(f"{len(self.class_names)} class_names for {logits.shape[1]} classes")
        log_probabilities = logits.log_softmax(dim=1)
        highest, predictions = log_probabilities.max(dim=1)
        losses = F.nll_loss(log_probabilities, labels, ignore_index=-1, reduction="none")
        sums_to_one = (logits.sum(dim=1) - 1).abs() < 0.01  # if all are True, these aren't logits
        return torch.stack([labels, predictions, highest.exp(), losses, sums_to_one])  # to float32

    def make_rows(self, loader, batches: list[Tensor]) -> np.ndarray:
        """Returns a row for each sample of this process. The index is -1 if unknown."""
        columns = torch.cat(batches, dim=1).cpu().numpy() if batches else np.empty((5, 0))
        indices = [-1] * columns.shape[1]
        batch_sampler = getattr(loader, "batch_sampler", None)
        if batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
            # Batches carry no indices, but the sampler yields them again, unless it shuffles.
            replayed = list(chain.from_iterable(islice(batch_sampler, len(batches))))
            if len(replayed) == len(indices):
                indices = replayed
        names = "index, label, prediction, confidence, loss, sums_to_one"
        return np.rec.fromarrays([indices, *columns], names=names, formats="i8, i4, i4, f4, f4, ?")

    def gather_rows(self, trainer, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of all processes, one for each labelled sample."""
        # Each rank broadcasts its rows, because Lightning's all_gather needs equal sizes.
        parts = [trainer.strategy.broadcast(rows, src=rank) for rank in range(trainer.world_size)]
        rows = np.concatenate(parts)
        if (rows["index"] >= 0).all():  # a DistributedSampler repeats some samples
            _, first_of_each = np.unique(rows["index"], return_index=True)
            rows = rows[first_of_each]
        return rows[rows["label"] >= 0]

    def log_panels(self, trainer, module, loader, dataloader_idx, rows: np.ndarray) -> None:
        if rows["sums_to_one"].all():
            raise ValueError("ImagePredictionLogger needs logits, not probabilities")
        labels, predictions, names = rows["label"], rows["prediction"], self.name_classes(rows)
        recalls = {names[c]: np.mean(predictions[labels == c] == c) for c in np.unique(labels)}
        prefix = "test" if trainer.testing else "val"
        suffix = f"/dataloader_idx_{dataloader_idx}" if dataloader_idx > 0 else ""
        lowest = f"{prefix}/lowest_recall{suffix}"  # logged on all ranks, for callbacks to monitor
        module.log(lowest, min(recalls.values()), sync_dist=True, add_dataloader_idx=False)
        if not trainer.is_global_zero:
            return
        panels = {f"{prefix}/recall/{name}{suffix}": recall for name, recall in recalls.items()}
        if rows["index"].min() < 0:
            rank_zero_warn("ImagePredictionLogger shows no images: their indices are unknown.")
        else:
            losses = np.nan_to_num(rows["loss"], nan=np.inf)  # NaN counts as the highest
            hardest = np.argsort(-losses, kind="stable")
            examples = np.random.default_rng(0).permutation(len(rows))  # the same in each epoch
            for panel, order in {"hardest": hardest, "examples": examples}.items():
                chosen = rows[order[: self.num_samples]]
                media = [self.render(trainer, loader, dataloader_idx, row, names) for row in chosen]
                panels[f"{prefix}/{panel}{suffix}"] = media
        self.log_to_wandb(trainer, panels)
        if len(names) <= 100:  # logged separately: a chart fails if the connection is lost
            chart = wandb.plot.confusion_matrix(y_true=labels, preds=predictions, class_names=names)
            self.log_to_wandb(trainer, {f"{prefix}/confusion_matrix{suffix}": chart})

    def name_classes(self, rows: np.ndarray) -> list[str]:
        """Returns unique class names, or numbers if `class_names` is None."""
        if self.class_names is None:
            return [str(i) for i in range(max(rows["label"].max(), rows["prediction"].max()) + 1)]
        names = [str(name) for name in self.class_names]
        are_unique = len(set(names)) == len(names)
        return names if are_unique else [f"{name} ({i})" for i, name in enumerate(names)]

    def render(self, trainer, loader, dataloader_idx, row: np.void, names: list[str]):
        """Loads a sample again, as the step received it, hooks included. Returns W&B media."""
        collate = getattr(loader, "collate_fn", torch.utils.data.default_collate)  # absent on TPUs
        batch = collate([loader.dataset[int(row["index"])]])
        # `batch_to_device` doesn't call on_before_batch_transfer, which by default does nothing.
        for owner in filter(None, [trainer.datamodule, trainer.lightning_module]):
            batch = owner.on_before_batch_transfer(batch, dataloader_idx)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
        inputs, labels = self.split_batch(batch)
        if labels.item() != row["label"]:  # the order must have changed
            raise ValueError("ImagePredictionLogger needs loaders that don't shuffle")
        image = self.make_visible(inputs[0].cpu())
        if self.to_media is None and (image.ndim != 3 or len(image) not in (1, 3)):
            raise ValueError(f"ImagePredictionLogger needs to_media for {tuple(image.shape)}")
        prediction, label = names[row["prediction"]], names[row["label"]]
        caption = f"Pred: {prediction} ({row['confidence']:.0%}), Label: {label} (#{row['index']})"
        return (self.to_media or wandb.Image)(image, caption=caption)

    def make_visible(self, image: Tensor) -> Tensor:
        """Converts an image to uint8, 0 to 255, because W&B 0.31 casts floats without scaling."""
        if image.ndim < 3 or image.dtype == torch.uint8:
            return image  # not (C, H, W), e.g. audio, or already uint8
        image = image.float().nan_to_num()
        if self.mean is not None and self.std is not None:
            mean, std = torch.tensor(self.mean), torch.tensor(self.std)
            image = image * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        elif image.min() < 0 or image.max() > 1:
            rank_zero_warn("ImagePredictionLogger rescales images; are mean and std missing?")
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-9)
        return (image.clamp(0, 1) * 255).round().byte()

    def log_to_wandb(self, trainer, panels: dict) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:
            return  # these runs only check that the panels can be built
        runs = [log.experiment for log in trainer.loggers if isinstance(log.experiment, wandb.Run)]
        if not runs:
            rank_zero_warn("ImagePredictionLogger logs nothing: the Trainer has no WandbLogger.")
        for run in runs:
            try:
                run.log(panels, commit=False)  # Lightning logs its metrics next and commits
            except wandb.errors.CommError as error:  # no connection to W&B
                rank_zero_warn(f"ImagePredictionLogger could not log a chart: {error}")


class StopAtSigterm(pl.Callback):
    """Ends a run on SIGTERM. Lightning 2.6's own handler can wait forever for other processes."""

    def on_train_start(self, trainer, module):
        with suppress(ValueError):  # only the main thread can set a handler
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    on_sanity_check_start = on_test_start = on_train_start  # Lightning has set its handler by then


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(usage=SUPPRESS, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, help="short for --accelerator gpu --devices GPUS; 0 means the CPU")
    add("--accelerator", default="auto", help="cpu, gpu, tpu, mps or auto")
    add("--devices", default="auto", help="a number, a list such as 0,1, or -1 for all")
    add("--strategy", default="auto", help="ddp, fsdp, ...")
    add("--num_nodes", type=int, default=1, help="number of machines")
    add("--precision", default="32-true", help="32-true, 16-mixed, bf16-mixed, ...")
    add("--max_epochs", type=int, default=5, help="passes over the training set")
    add("--fast_dev_run", action="store_true", help="one batch of each stage; writes no files")
    add("--batch_size", type=int, default=128, help="samples per batch, on each device")
    add("--lr", type=float, default=0.015, help="learning rate at the start; it falls to zero")
    add("--seed", type=int, default=0, help="for initial weights, shuffling and random crops")
    add("--dataset", choices=[*DATASETS, "digits"], help="by default mnist, or digits if offline")
    add("--data_dir", default="data", help="folder of the data set, which is downloaded if missing")
    add("--num_samples", type=int, default=32, help="images per panel, up to 108")
    add("--ckpt_path", help="checkpoint to resume from")
    add("--project", default=os.environ.get("WANDB_PROJECT", "lightning-digits"), help="in W&B")
    return parser


def choose_wandb_mode() -> str | None:
    """Returns "offline" without an account or a connection. None keeps W&B's own setting."""
    if wandb.setup().settings.mode != "online":  # the user has chosen another mode
        return None
    with suppress(wandb.errors.AuthenticationError):  # invalid key, or W&B can't be reached
        if wandb.login(prompt=False):  # False if there is no key
            return None
    return "offline"


def make_trainer(args: Namespace) -> pl.Trainer:
    if args.gpus is not None:
        args.accelerator = "gpu" if args.gpus else "cpu"
        args.devices = args.gpus or "auto"
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds to upload the rest at the end
    mode = None if args.fast_dev_run else choose_wandb_mode()
    logger = pl.loggers.WandbLogger(project=args.project, save_dir=None, mode=mode)  # in WANDB_DIR
    return pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy,
        num_nodes=args.num_nodes,
        precision=args.precision,
        max_epochs=args.max_epochs,
        fast_dev_run=args.fast_dev_run,
        log_every_n_steps=10,
        logger=logger,
        callbacks=[
            ImagePredictionLogger(args.num_samples, CLASS_NAMES.get(args.dataset), [MEAN], [STD]),
            StopAtSigterm(),
            pl.callbacks.EarlyStopping("val/loss", patience=1_000_000),  # stops only on NaN or inf
            pl.callbacks.LearningRateMonitor(),
            pl.callbacks.TQDMProgressBar(refresh_rate=20),
            pl.callbacks.ModelCheckpoint(monitor="val/loss"),  # becomes trainer.checkpoint_callback
            # Overwritten every epoch. In Lightning 2.6, save_last=True needs an improved val/loss.
            pl.callbacks.ModelCheckpoint(filename="last", enable_version_counter=False),
        ],
    )


def main(argv: list[str] | None = None) -> None:
    """Trains, then tests the checkpoint with the lowest validation loss."""
    parser = make_parser()
    args = parser.parse_args(argv)
    numbers = [args.lr, args.num_nodes, args.max_epochs, args.batch_size, args.num_samples]
    if not all(number > 0 for number in numbers):
        parser.error("lr, num_nodes, max_epochs, batch_size and num_samples must be positive")
    pl.seed_everything(args.seed, verbose=False)
    try:
        trainer = make_trainer(args)
        trainer.logger.log_hyperparams(vars(args))  # starts the run
    except Exception as error:  # the Trainer or W&B refuses a flag
        parser.error(" ".join(str(error).split()))  # on one line
    dataset = args.dataset or ("digits" if args.fast_dev_run else None)
    data = DigitsDataModule(dataset, args.data_dir, args.batch_size)
    status = 1
    try:
        # With weights_only=True, no checkpoint can execute code.
        trainer.fit(DigitClassifier(args.lr), data, ckpt_path=args.ckpt_path, weights_only=True)
        if not math.isfinite(trainer.callback_metrics.get("val/loss", 0)):
            if trainer.global_rank > 0:
                return  # rank 0 raises for all: if another rank did first, Lightning would kill it
            raise FloatingPointError("the loss is not finite: try a lower --lr")
        best_path = trainer.checkpoint_callback.best_model_path or None  # None in a fast_dev_run
        trainer.test(trainer.lightning_module, data, ckpt_path=best_path, weights_only=True)
        with suppress(wandb.errors.CommError):  # no connection, but the file is on disk
            trainer.logger.experiment.log_model(best_path, "digit-classifier", ["best"])
        trainer.print("Checkpoint:", best_path)
        status = 0
    finally:
        wandb.finish(exit_code=status)


if __name__ == "__main__":
    gc.freeze()  # exempts imported modules from garbage collection: saves two seconds a run
    main()
