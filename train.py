"""Train a CNN on handwritten digits with PyTorch Lightning, and see in Weights & Biases what it gets wrong.

    python train.py                                  # on whatever this machine has: CPU, GPU or TPU
    python train.py --gpus 1 --precision bf16-mixed  # on one GPU, or with --gpus 8 on eight
    python train.py --fast_dev_run                   # one batch of everything; writes no file
    wandb leet wandb/latest-run                      # look at the run, without an account
"""

import argparse
import gc
import math
import os
import shlex
import signal
import sys
from contextlib import suppress

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import wandb
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_recall
from torchvision import datasets, transforms

# ----------------------------------------------------------------------------------------------------- data

DATASETS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}


def load_dataset(name: str, data_dir: str, train: bool) -> TensorDataset:
    """Images uint8 (N, 1, 28, 28), labels int64 (N,) and indices int64 (N,). Missing files are downloaded."""
    if name == "digits":  # scikit-learn ships 1,797 of them, with 8 x 8 pixels from 0 to 16
        from sklearn.datasets import load_digits
        images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
        images = F.interpolate(images.view(-1, 1, 8, 8) * (255 / 16), size=28, mode="bilinear").round().byte()
    else:
        dataset = DATASETS[name](data_dir, train, download=True)
        images, labels = dataset.data[:, None], dataset.targets
    return TensorDataset(images, labels, torch.arange(len(labels)))


class DigitsDataModule(pl.LightningDataModule):
    """Batches of images uint8 (N, 1, 28, 28), labels int64 (N,) and the samples' indices int64 (N,)."""

    def __init__(self, dataset: str | None, data_dir: str, batch_size: int) -> None:
        super().__init__()
        self.dataset, self.data_dir, self.batch_size = dataset, data_dir, batch_size

    def prepare_data(self) -> None:
        """Takes digits where MNIST can't be had. Raises ValueError if it was named or is damaged."""
        name = self.dataset or "mnist"
        try:
            load_dataset(name, self.data_dir, train=True)
            load_dataset(name, self.data_dir, train=False)
        except Exception as error:
            last_file = os.path.join(self.data_dir, "MNIST", "raw", "t10k-labels-idx1-ubyte")
            if self.dataset or os.path.exists(last_file):  # MNIST is there, but damaged
                raise ValueError(f"{name} in {self.data_dir} can't be read: {error}") from error
            print(f"No MNIST in {self.data_dir}, and no download: training on scikit-learn's digits instead.")
            self.dataset = "digits"

    def setup(self, stage: str) -> None:
        """Loads the data set that rank zero settled on, and splits it in the same way for every seed."""
        self.dataset = self.trainer.strategy.broadcast(self.dataset or "mnist")
        self.data = load_dataset(self.dataset, self.data_dir, train=True)  # data[[3, 7]] is a batch
        generator = torch.Generator().manual_seed(0)
        if self.dataset == "digits":
            self.train, self.val, self.test = random_split(self.data, [1413, 128, 256], generator)
            self.train.indices *= 8  # a list, repeated: an epoch takes each sample eight times
        else:
            self.train, self.val = random_split(self.data, [55_000, 5_000], generator)
            self.test = load_dataset(self.dataset, self.data_dir, train=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train.indices, self.batch_size, shuffle=True, collate_fn=self.data.__getitem__)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.batch_size)

    def state_dict(self) -> dict[str, Tensor]:
        return {"rng_state": torch.get_rng_state()}  # a run resumed between epochs shuffles as before

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["rng_state"])


# ---------------------------------------------------------------------------------------------------- model

class DigitClassifier(pl.LightningModule):
    """LeNet's shape with batch norm. It takes raw pixels, so that all data is normalised in the same way."""

    MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, from 0 to 1

    def __init__(self, lr: float = 0.015, **flags) -> None:
        super().__init__()
        self.save_hyperparameters()  # all flags, in checkpoints and in W&B's config
        self.augment = transforms.RandomCrop(28, padding=1)
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 128, 3, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * 3 * 3, 10),
        ).to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Raw pixels uint8 (N, 1, 28, 28) to logits float (N, 10)."""
        return self.network((images / 255 - self.MEAN) / self.STD)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, _ = batch
        logits = self(torch.cat([self.augment(part) for part in images.chunk(4)]))  # four crops: 0.1 ms
        if (self.global_step + 1) % self.trainer.log_every_n_steps:  # not logged, so save the milliseconds
            return F.cross_entropy(logits, labels)
        return self.log_metrics("train", logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the logits, float (N, 10), which ImagePredictionLogger looks at."""
        images, labels, _ = batch
        logits = self(images)
        self.log_metrics("test" if self.trainer.testing else "val", logits, labels)
        return logits
    test_step = validation_step

    def log_metrics(self, stage: str, logits: Tensor, labels: Tensor) -> Tensor:
        """Logs loss and accuracy, for validation and test as means over the set. Returns the loss."""
        loss = F.cross_entropy(logits, labels)
        accuracy = multiclass_accuracy(logits, labels, 10, "micro", validate_args=False)  # no wait for a GPU
        metrics = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels), sync_dist=stage != "train")
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW; the rate rises for 30 % of the steps, then falls (Smith and Topin, arXiv:1708.07120)."""
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, (0.9, 0.95), weight_decay=0.05)
        steps = self.trainer.estimated_stepping_batches
        def one_cycle(step: int) -> float:
            progress = (step + 1) / steps
            return min(progress / 0.3, 0.5 + 0.5 * math.cos(math.pi * (progress - 0.3) / 0.7))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# ------------------------------------------------------------------------------------------------ callbacks

class ImagePredictionLogger(pl.Callback):
    """Shows in W&B what goes into a classifier and what comes out, after every validation and test epoch.

    Batches begin with (inputs, labels). A third tensor, int64 (N,), is taken as the samples' indices; without
    it an index is the position in the loader, so don't shuffle that. Steps return the logits, (N, classes) or
    (N, 1) for two classes, alone or as "logits" in a dict; otherwise `pl_module(inputs)` computes them again.
    Pictures show what the first layer with weights received, or the inputs if that had another shape.

    Args:
        num_samples: how many `examples` (always the same) and `hardest` (highest loss) to show, up to 108.
        class_names: one for each class; by default their numbers.
        mean, std: of Normalize, one a channel, to undo it; or give the LightningModule a `denormalize`.
        unpack: takes (inputs, labels) out of other batches: `lambda batch: (batch["image"], batch["label"])`.
        to_media: shows other inputs: `lambda wave, caption: wandb.Audio(wave.squeeze(), 16000, caption)`.
    """

    def __init__(self, num_samples=32, class_names=None, mean=None, std=None, unpack=tuple, to_media=None):
        self.num_samples, self.class_names, self.mean, self.std = num_samples, class_names, mean, std
        self.unpack, self.to_media = unpack, to_media or wandb.Image

    def on_validation_epoch_start(self, trainer, pl_module, dataloader_idx=0):
        self.dataloader_idx, self.layer_input, self.outcomes, self.pictures = dataloader_idx, None, {}, {}
        first_layer = next(layer for layer in pl_module.modules() if list(layer.parameters(recurse=False)))
        self.hook = first_layer.register_forward_pre_hook(self.keep_layer_input)

    def keep_layer_input(self, layer, args):
        self.layer_input = args[0] if args else None

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx != self.dataloader_idx:  # a new loader: first log the one before
            self.on_validation_epoch_end(trainer, pl_module)
            self.on_validation_epoch_start(trainer, pl_module, dataloader_idx)
        try:
            self.collect(trainer, pl_module, outputs, *self.unpack(batch))
        except Exception as error:
            raise ValueError("ImagePredictionLogger needs batches of pictures (N, C, H, W) and labels (N,),"
                             f" and logits (N, classes), or what its docstring says: {error}") from error

    def collect(self, trainer, pl_module, outputs, inputs, labels, indices=None, *others):
        """Keeps (label, prediction, loss, caption) of each sample, and the pictures of the few to show."""
        logits = outputs.get("logits") if isinstance(outputs, dict) else outputs
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            logits = pl_module(inputs)
        logits = F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits  # sigmoid(x) = softmax(0, x)
        logits, labels = logits.float().cpu(), labels.cpu().reshape(len(logits), -1).squeeze(1)
        names = self.names = self.class_names or [str(number) for number in range(logits.shape[1])]
        if getattr(indices, "dtype", None) != torch.int64 or indices.shape != labels.shape:
            indices = self.find_positions(trainer, len(labels))
        distinct = len(set(names)) == logits.shape[1] and len(set(indices.tolist())) == len(labels)
        if not distinct or (labels != labels.long()).any():
            raise ValueError(f"{logits.shape[1]} classes named {names}, labels {labels}, indices {indices}")
        losses = F.cross_entropy(logits, labels.long(), reduction="none").nan_to_num(math.inf)
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        columns = [column.tolist() for column in (indices, labels.long(), predictions, losses, confidences)]
        for index, label, prediction, loss, confidence in zip(*columns):
            caption = f"Pred: {names[prediction]} ({confidence:.0%}), Label: {names[label]} (#{index})"
            self.outcomes[index], self.pictures[index] = (label, prediction, loss, caption), None
        self.keep_examples_and_hardest()
        inputs = self.layer_input if getattr(self.layer_input, "shape", None) == inputs.shape else inputs
        kept = [pair for pair in zip(columns[0], inputs) if pair[0] in self.pictures]  # few, in later batches
        self.pictures.update({index: self.read_picture(pl_module, picture) for index, picture in kept})

    def find_positions(self, trainer, count):
        """Positions in the loader: of w ranks, rank r gets r, r + w, ...; past the end, from the start."""
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        sampler = getattr(CombinedLoader(loaders).flattened[self.dataloader_idx], "sampler", None)
        length = len(sampler.dataset) if isinstance(sampler, DistributedSampler) else sys.maxsize
        seen = torch.arange(len(self.outcomes), len(self.outcomes) + count)
        return (seen * trainer.world_size + trainer.global_rank) % length

    def read_picture(self, pl_module, picture):
        if self.to_media is wandb.Image and (picture.ndim != 3 or picture.shape[0] not in (1, 3)):
            raise ValueError(f"inputs {tuple(picture.shape)} are no pictures, so give to_media")
        if self.to_media is not wandb.Image or not picture.is_floating_point():
            return picture.cpu().clone()  # a view would keep the whole batch
        if self.mean is not None:
            mean, std = (picture.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
            picture = picture * std + mean
        elif hasattr(pl_module, "denormalize"):
            picture = pl_module.denormalize(picture[None])[0]
        elif not 0 <= picture.min() <= picture.max() <= 1:
            rank_zero_warn("ImagePredictionLogger stretches values from outside 0 to 1: give mean and std.")
            picture = transforms.functional.autocontrast(picture)
        return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def keep_examples_and_hardest(self):
        examples = sorted(self.pictures, key=lambda i: hash((i,)))[: self.num_samples]  # a fixed shuffle
        hardest = sorted(self.pictures, key=lambda i: (-self.outcomes[i][2], i))[: self.num_samples]
        self.pictures = {i: self.pictures[i] for i in examples + hardest}
        return {"examples": examples, "hardest": hardest}

    def on_validation_epoch_end(self, trainer, pl_module):
        """Gathers the samples of all ranks, each sample once, and logs them from the first rank."""
        self.hook.remove()
        mine = self.outcomes, self.pictures
        for rank in range(trainer.world_size):
            outcomes, pictures = trainer.strategy.broadcast(mine, src=rank)
            self.outcomes, self.pictures = self.outcomes | outcomes, self.pictures | pictures
        if not trainer.is_global_zero or not self.outcomes:
            return
        labels, predictions, *_ = zip(*self.outcomes.values())
        recall = multiclass_recall(torch.tensor(predictions), torch.tensor(labels), len(self.names), "none")
        panels = {f"recall/{self.names[label]}": recall[label].item() for label in set(labels)}
        if len(self.names) <= 100:
            panels["confusion_matrix"] = wandb.plot.confusion_matrix(None, labels, predictions, self.names)
        for panel, indices in self.keep_examples_and_hardest().items():
            panels[panel] = [self.to_media(self.pictures[i], caption=self.outcomes[i][3]) for i in indices]
        stage = "test" if trainer.testing else "val"
        suffix = f"/dataloader_idx_{self.dataloader_idx}" if self.dataloader_idx else ""
        if wandb.run is not None and not trainer.sanity_checking:  # the row ends with Lightning's own metrics
            for name, panel in panels.items():
                with suppress(wandb.errors.AuthenticationError):  # a chart needs a server that answers
                    wandb.run.log({f"{stage}/{name}{suffix}": panel}, commit=False)
            wandb.run.log({"trainer/global_step": trainer.global_step}, commit=not trainer.logged_metrics)
        elif wandb.run is None and not trainer.fast_dev_run:
            rank_zero_warn("ImagePredictionLogger logs nothing: the Trainer has no WandbLogger.")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


class StopAtBatchEnd(pl.Callback):
    """Ends training on all devices after Ctrl+C or SIGTERM, or when the loss is not finite any more."""

    def on_train_start(self, trainer, pl_module):
        self.signal_number = 0
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)  # Lightning's own handler would exit with status 0

    def receive(self, number, frame):
        self.signal_number = number
        signal.signal(number, signal.SIG_DFL)  # the second one kills

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % trainer.log_every_n_steps == 0:  # to look at every loss would stall a GPU
            if trainer.strategy.reduce_boolean_decision(not outputs["loss"].isfinite(), all=False):
                raise FloatingPointError(f"the loss is not finite at step {trainer.global_step}: lower --lr")
            if trainer.strategy.reduce_boolean_decision(self.signal_number > 0, all=False):
                trainer.save_checkpoint(os.path.join(trainer.checkpoint_callback.dirpath, "last.ckpt"))
                trainer.progress_bar_callback.train_progress_bar.close()  # at exit it would draw itself again
                raise SystemExit(128 + (self.signal_number or signal.SIGTERM))  # or: on another rank


# --------------------------------------------------------------------------------------------- command line

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, help="short for --accelerator gpu --devices GPUS; 0 is the CPU, -1 all GPUs")
    add("--accelerator", default="auto", help="cpu, gpu, tpu, mps or auto")
    add("--devices", default="auto", help="how many, or which, as in 0,1, or -1 for all")
    add("--strategy", default="auto", help="ddp, fsdp, ...")
    add("--num_nodes", type=int, default=1, help="number of machines")
    add("--precision", default="32-true", help="32-true, 16-mixed, bf16-mixed, ...")
    add("--max_epochs", type=int, default=5, help="passes over the training set")
    add("--fast_dev_run", action="store_true", help="one batch of everything; writes no file")
    add("--batch_size", type=int, default=128, help="per device")
    add("--lr", type=float, default=0.015, help="highest learning rate of the schedule")
    add("--seed", type=int, default=0, help="for weights, order and augmentation")
    add("--dataset", choices=[*DATASETS, "digits"], help="None means mnist, or digits where it can't be had")
    add("--data_dir", default="data", help="where the data set is or will be downloaded")
    add("--num_samples", type=int, default=32, help="pictures in a panel of W&B, at most 108")
    add("--ckpt_path", help="checkpoint to resume from")
    add("--project", default=os.environ.get("WANDB_PROJECT", "lightning-digits"), help="W&B's project")
    return parser


def check_checkpoint(path: str, model: DigitClassifier) -> None:
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except Exception as error:
        raise ValueError(f"--ckpt_path {path} can't be read, or is no checkpoint of this model") from error


def choose_mode(args: argparse.Namespace) -> str | None:
    """Returns "offline" if there are no credentials or W&B doesn't answer, else None: W&B's own setting."""
    try:
        if args.fast_dev_run or wandb.setup().settings.mode != "online" or wandb.login(prompt=False):
            return None
    except wandb.errors.AuthenticationError as error:
        rank_zero_info(f"W&B can't be used online, so the run is recorded offline: {error}")
    return "offline"


def make_trainer(args: argparse.Namespace) -> pl.Trainer:
    if not min(args.lr, args.num_nodes, args.max_epochs, args.batch_size, args.num_samples) > 0:  # NaN isn't
        raise ValueError("lr, num_nodes, max_epochs, batch_size and num_samples must be greater than 0")
    if args.gpus is not None:
        args.accelerator, args.devices = ("gpu", args.gpus) if args.gpus else ("cpu", "auto")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds for the last uploads; else for ever
    class_names = [name.split(" - ")[0] for name in DATASETS.get(args.dataset, datasets.MNIST).classes]
    show = ImagePredictionLogger(args.num_samples, class_names, DigitClassifier.MEAN, DigitClassifier.STD)
    last = ModelCheckpoint(filename="last", enable_version_counter=False)  # StopAtBatchEnd overwrites it, too
    best = ModelCheckpoint(monitor="val/loss")
    return pl.Trainer(
        accelerator=args.accelerator, devices=args.devices, strategy=args.strategy, num_nodes=args.num_nodes,
        precision=args.precision, max_epochs=args.max_epochs, fast_dev_run=args.fast_dev_run,
        logger=WandbLogger(project=args.project, save_dir=None, mode=choose_mode(args)), log_every_n_steps=10,
        callbacks=[show, StopAtBatchEnd(), LearningRateMonitor(), TQDMProgressBar(20), best, last],
    )


def main(argv: list[str] | None = None) -> None:
    """Trains, tests with the best checkpoint, and says where to look. Raises SystemExit if it is stopped."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        trainer = make_trainer(args)
        dataset = args.dataset or ("digits" if args.fast_dev_run else None)
        data = DigitsDataModule(dataset, args.data_dir, args.batch_size)
        if trainer.local_rank == 0:
            data.prepare_data()  # as the Trainer will, but before there is a W&B run
        pl.seed_everything(args.seed, verbose=False)
        model = DigitClassifier(**vars(args) | {"dataset": data.dataset or "mnist"})
        if args.ckpt_path:
            check_checkpoint(args.ckpt_path, model)
    except Exception as error:
        parser.error(" ".join(str(error).split()))

    best, status = trainer.checkpoint_callback, 1
    try:  # weights_only: nothing in a checkpoint is executed
        trainer.fit(model, data, ckpt_path=args.ckpt_path, weights_only=True)
        trainer.test(model, data, ckpt_path=best.best_model_path or None, weights_only=True)
        if wandb.run is not None:
            with suppress(wandb.errors.AuthenticationError):  # as with charts
                wandb.run.log_model(best.best_model_path, f"model-{wandb.run.id}", aliases=["best"])
        status = 0
    except SystemExit as stop:
        status = stop.code or 128 + signal.SIGTERM  # before the first batch, Lightning exits without code
    finally:
        run = wandb.run
        wandb.finish(exit_code=status)
    if run is not None and not run.disabled:
        folder = os.path.relpath(run.sync_dir)
        checkpoint = os.path.relpath(f"{best.dirpath}/last.ckpt" if status else best.best_model_path)
        print(f"See the run: wandb leet {folder}\nUpload it: wandb sync {folder}\nCheckpoint: {checkpoint}")
        if status:
            flags = shlex.join([*(sys.argv[1:] if argv is None else argv), "--ckpt_path", checkpoint])
            print(f"Resume it: WANDB_RUN_ID={run.id} python train.py {flags}")
    if status and trainer.local_rank == 0:  # if another rank exited first, Lightning would kill this one
        sys.exit(status)


if __name__ == "__main__":
    gc.freeze()  # else Python would end with a search for garbage in all of PyTorch, which takes a second
    main()
