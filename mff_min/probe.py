"""What a frozen encoder knows, measured on its features: a linear probe, a convex probe, nearest neighbours.

Shapes: B images, n training images, C H W, D width, T tokens (class token first), G classes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mff_min.errors import Fault


def check_measured(values, what):
    """Raise Fault if a row of values (B, ...) has a number that is not finite; waits for the device.

    Scores that are not finite raise a Fault; they are never counted as answers. what names the values.
    """
    bad = values.flatten(1).isfinite().all(dim=1).logical_not()         # (B,)
    if bad.any():
        raise Fault(f"{what} of {int(bad.sum())} in {len(bad)} images are not finite: the weights had "
                    f"diverged, or --dtype is too narrow for them")


class LinearProbe(nn.Module):
    """Batch normalisation without parameters, then a linear classifier: (B, D) -> logits (B, G).

    MAE, A.1. Its statistics are those of one micro-batch on one process, as in the official code: they are
    neither synchronised across ranks nor accumulated.
    """

    def __init__(self, dim, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, features):
        return self.head(self.norm(features))


def pool_tokens(x, pool):
    """One feature per image, (B, T, D) -> (B, D): the class token ("token") or the others' mean ("avg")."""
    return x[:, 0] if pool == "token" else x[:, 1:].mean(dim=1)


def pixel_features(images, most=64):
    """The pixels themselves, (B, C, H, W) -> (B, D), averaged down to at most 64 x 64 of each channel."""
    H, W = images.shape[-2:]
    return F.adaptive_avg_pool2d(images, (min(H, most), min(W, most))).flatten(1)


def count_hits(scores, labels):
    """[images, those with their label in the top 1, in the top 5]: ints, of scores (B, G) and labels (B,).

    Raises Fault where scores are not finite: NaN is the largest of them, and so an answer.
    """
    check_measured(scores, "the scores")
    top5 = scores.topk(min(5, scores.shape[1])).indices                 # (B, 5), of few classes fewer
    hits = top5 == labels[:, None]
    return [len(labels), int(hits[:, 0].sum()), int(hits.any(dim=1).sum())]


@torch.no_grad()
def count_all(score, batches, bad_samples):
    """count_hits of score(batch) (B, G), added up over a loader's batches; an unreadable image is a miss."""
    counts = torch.zeros(3, dtype=torch.int64)
    for batch in batches:
        bad_samples.add(batch["bad"])
        scores = score(batch)
        labels = batch["label"].masked_fill(batch["replaced"], -1).to(scores.device)
        counts += torch.tensor(count_hits(scores, labels))
    return counts.tolist()


@torch.no_grad()
def collect_features(measure, batches, bad_samples, progress):
    """({name: features (n, D)} of measure(batch) over a loader's batches, labels (n,)), on the CPU.

    The label of an unreadable image is -1. Raises Fault where a feature is not finite.
    """
    found, labels, done = [], [], 0
    for batch in batches:
        bad_samples.add(batch["bad"])
        found.append({name: features.cpu() for name, features in measure(batch).items()})
        for features in found[-1].values():
            check_measured(features, "the features")
        labels.append(batch["label"].masked_fill(batch["replaced"], -1))
        done += len(labels[-1])
        progress.tick(done)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}, torch.cat(labels)


def accuracy(images, top1, top5):
    """acc1 and acc5 in percent, each with its binomial standard error, and the number of images."""
    found = dict(val_images=images)
    for name, hits in (("acc1", top1), ("acc5", top5)):
        p = hits / images
        found |= {name: 100 * p, f"{name}_error": 100 * (p * (1 - p) / images) ** 0.5}
    return found


def shown(metrics):
    """Accuracies as a line of text, with one standard error each."""
    return (f"acc1 {metrics['acc1']:.2f} +- {metrics['acc1_error']:.2f} %, acc5 {metrics['acc5']:.2f} +- "
            f"{metrics['acc5_error']:.2f} % of {metrics['val_images']} validation images")


def logistic_scores(train, labels, num_classes, val, l2=1e-3):
    """Scores (B, G) of val (B, D) by multinomial logistic regression on train (n, D) with labels (n,).

    Features are standardised with train's mean and deviation. L-BFGS minimises cross-entropy plus
    l2 / 2 * |weight| ** 2, which is convex: the answer depends on the features alone, not on a recipe.
    """
    mean, std = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)     # each (D,)
    train, val = (train - mean) / std, (val - mean) / std
    weight = torch.zeros(num_classes, train.shape[1], device=train.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=10, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return F.linear(val, weight, bias).detach()                         # (B, G)


def knn_scores(train, labels, num_classes, val, k, temperature=0.07):
    """Votes (B, G) for val (B, D) by its k nearest of train (n, D), each of weight exp(cosine / temperature).

    InstDisc, arXiv 1805.01978; k = 20 and temperature 0.07 are DINO's (arXiv 2104.14294).
    """
    train, val = F.normalize(train, dim=1), F.normalize(val, dim=1)
    votes = []
    for chunk in val.split(256):                                        # n similarities for each of them
        cosine, nearest = (chunk @ train.T).topk(min(k, len(train)))
        weight = ((cosine - 1) / temperature).exp()                     # - 1: no overflow, the same ranking
        vote = weight.new_zeros(len(chunk), num_classes)
        votes.append(vote.scatter_add_(1, labels[nearest], weight))
    return torch.cat(votes)                                             # (B, G)
