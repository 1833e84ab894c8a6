"""Membrane distillation (MD-SNN, arXiv 2512.04443): the student learns the teacher's membranes.

    L = CE + alpha · L_logit + beta · L_mem

L_logit = tau² · KL(softmax(z_T/tau) ‖ softmax(z_S/tau)), mean over the batch. L_mem compares the
membrane potentials u_T of the teacher with the quantized û_S of the student, before reset, and is
the mean over layers and timesteps of
    CLK: KL(softmax(u_T) ‖ softmax(û_S)), softmax over a layer's C·H·W neurons, mean over the batch
    CLM: the mean squared difference
    CL:  nothing.
u_T is clamped to the range of the student's codes before (`within_reach`), which is chosen to suit
the teacher (`start_membrane_steps`), and CLK's softmaxes contain the neuron's threshold
(`membrane_kl`).

The two may have other numbers of timesteps T. On a static image a network's first steps are the
same whatever comes after them: the teacher runs once, for the longer of both, its logits are those
of its own T, and the membranes of the student's steps are compared. On events it runs on the
student's frames.

Losses are computed in float32 or wider, also under autocast. By default beta falls to zero over
the training, in a cosine: membranes first, classes later.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

import kernels
from kernels import as_rows, at_least_float32, integer_codes
from models.network import SpikingNetwork, folded
from models.neuron import LIF, neuron_of
from quantization import membrane_steps

# (images, labels) -> (logits, loss, unweighted terms of the loss)
LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


class _SoftmaxKL(torch.autograd.Function):
    """Keeps one tensor for backward, where autograd would keep four."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, anchor: Tensor) -> Tensor:
        kl, gradient = kernels.softmax_kl_forward(student, teacher, anchor)
        ctx.save_for_backward(gradient)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        # In place: torch refuses a second backward.
        return ctx.saved_tensors[0].mul_(grad), None, None


def softmax_kl(student: Tensor, teacher: Tensor, anchor: float = -math.inf) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) of rows, both (rows, values), mean over rows; in each
    softmax there is one more value, the anchor."""
    student = at_least_float32(student)
    return _SoftmaxKL.apply(student, at_least_float32(teacher), student.new_full((), anchor))


def logit_kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau² · KL(softmax(teacher/tau) ‖ softmax(student/tau)) of logits (B, K), mean over B."""
    return tau**2 * softmax_kl(at_least_float32(student) / tau, at_least_float32(teacher) / tau)


def membrane_kl(student: Tensor, teacher: Tensor, threshold: float = -math.inf) -> Tensor:
    """KL(softmax(u_T) ‖ softmax(û_S)) of a layer's membrane potentials (T, B, C, H, W), mean over
    timesteps and images.

    A softmax does not change where a whole layer is shifted, but its spikes do. With a `threshold`
    each has one more element, which weighs as much as the layer's N neurons, were they all at the
    threshold: threshold + log N.
    """
    rows, rows_of_teacher = (as_rows(u.flatten(0, 1)) for u in (student, teacher))
    return softmax_kl(rows, rows_of_teacher, threshold + math.log(rows.shape[1]))


def membrane_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of a layer's membrane potentials (T, B, C, H, W)."""
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher))


@torch.no_grad()
def within_reach(u_teacher: Tensor, neuron: LIF) -> Tensor:
    """A teacher's membrane potentials, of any shape, clamped in place to the range of the codes of
    the student's neuron, low·Δ to high·Δ.

    What lies beyond no student can match, and above no spike of this timestep depends on it: the
    largest code is above the threshold, so the neuron fires and is reset (a soft reset leaves the
    teacher more than the student can have). But it weighs: where a CIFAR-10 teacher reads the
    residual stream, it has most of the softmax's mass, and a hundredth of the neurons has up to
    half.

    Δ must not be learned then: L_mem is smallest where the range is, and would take it there.
    """
    if neuron.quantizer is None:
        return u_teacher
    step = neuron.quantizer.used_step()
    low, high = neuron.quantizer.low * step, neuron.quantizer.high * step
    if u_teacher.device.type == "cpu":  # there clamp_ between tensors takes ten times as long
        return u_teacher.clamp_min_(low).clamp_max_(high)
    return u_teacher.clamp_(low, high)


@torch.no_grad()
def start_membrane_steps(student: SpikingNetwork, teacher: SpikingNetwork, images: Tensor) -> None:
    """Start the membrane step of each of the student's layers where its codes can come nearest to
    the teacher's potentials on some images: of `quantization.membrane_steps`, the one that rounds
    them with the least mean squared error.

    The largest code of a plain student's start is 2θ. Where a teacher reads the residual stream,
    much of what it has is beyond; longer steps reach it, and rounding to them changes no spike.
    """
    student_layer = {teacher.get_submodule(name): x for name, x in student.neurons().items()}

    def choose(layer_of_teacher: LIF, u: Tensor) -> None:
        layer = student_layer[layer_of_teacher]
        if (quantizer := layer.quantizer) is None:
            return

        def error(step: float) -> float:
            codes = integer_codes(u, u.new_tensor(step), quantizer.low, quantizer.high)
            return membrane_mse(codes * step, u).item()

        steps = membrane_steps(quantizer.bits, layer.neuron.threshold)
        quantizer.step.fill_(min(steps, key=error))

    with teacher.running_for(student.time_window):
        teacher.eval()(images, membranes=choose)


# Of --loss: (a layer's membranes of the student, those of the teacher within its reach, both
# (T, B, C, H, W), the neuron's threshold) -> a scalar. One of one's own goes in here, and its
# default weight in BETA (docs/extend.md).
MEMBRANE_LOSSES = {
    "CLK": membrane_kl,
    "CLM": lambda student, teacher, threshold: membrane_mse(student, teacher),
    "CL": None,
}
# Counts the definitions of L_mem: a run that is gone on with shall know of another one.
MEMBRANE_LOSS_VERSION = 2  # 1: of all of a teacher's potentials, also of what is out of reach
ALPHA, TAU = 1.0, 4.0
BETA = {"CLK": 100.0, "CLM": 30.0, "CL": 0.0}
BETA_SCHEDULES = {  # share of the training that is done -> share of beta
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
BETA_SCHEDULE = "cosine"


def teacher_steps(student: int, teacher: int, loss: str, events: bool = False) -> tuple[int, int]:
    """(timesteps that a teacher runs for, the first of them that its logits are the mean of), for a
    student and a teacher of so many each."""
    of_logits = student if events else teacher
    return max(of_logits, 0 if MEMBRANE_LOSSES[loss] is None else student), of_logits


class Distiller:
    """Computes the student's loss against a frozen teacher.

    It is not a module, so the teacher enters neither the student's checkpoint nor its
    DistributedDataParallel.

    Args:
        teacher: full-precision network; a copy is used, in evaluation mode, without gradients and
            with its batch norms folded into its convolutions.
        student: the network to train, possibly inside DistributedDataParallel.
        loss: "CLK", "CLM" or "CL".
        alpha, beta: weights of L_logit and L_mem; beta None is the loss's own default.
        tau: temperature of L_logit.
        beta_schedule: "cosine" or "constant", followed by `set_epoch`.
        label_smoothing: share of CE's target that all classes get alike, as torch's.
    """

    def __init__(
        self,
        teacher: SpikingNetwork,
        student: nn.Module,
        loss: str = "CLK",
        alpha: float = ALPHA,
        beta: float | None = None,
        tau: float = TAU,
        beta_schedule: str = BETA_SCHEDULE,
        label_smoothing: float = 0.0,
    ):
        self.teacher, self.teacher_time_window = folded(teacher), teacher.time_window
        self.student = student
        self.network = student.module if isinstance(student, DistributedDataParallel) else student
        self.loss, self.membrane_loss = loss, MEMBRANE_LOSSES[loss]
        self.teacher_layer = {  # of each of the student's: that of the same name
            layer: self.teacher.get_submodule(name)
            for name, layer in self.network.neurons().items()
        }
        self.alpha, self.beta, self.tau = alpha, BETA[loss] if beta is None else beta, tau
        self.beta_schedule = BETA_SCHEDULES[beta_schedule]
        self.label_smoothing = label_smoothing
        # A tensor that stays where it is: a CUDA graph of a training step reads it there.
        self.beta_now = torch.tensor(
            self.beta, dtype=torch.float64, device=next(student.parameters()).device
        )

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Weigh L_mem for this epoch, counted from 1."""
        self.beta_now.fill_(self.beta * self.beta_schedule((epoch - 1) / epochs))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(student's logits (B, K), loss, its unweighted terms "ce", "logit" and "membrane")."""
        T, events = self.network.time_window, images.dim() == 5
        self.teacher.time_window, of_logits = teacher_steps(
            T, self.teacher_time_window, self.loss, events
        )
        u_of_teacher: dict[LIF, Tensor] = {}
        by_layer: list[Tensor] = []

        def keep(layer: LIF, u: Tensor) -> None:
            # A view would keep the memory of all timesteps.
            u_of_teacher[layer] = u if len(u) == T else u[:T].clone()

        def compare(layer: LIF, u_student: Tensor) -> None:
            u_teacher = within_reach(u_of_teacher.pop(self.teacher_layer[layer]), layer)
            by_layer.append(self.membrane_loss(u_student, u_teacher, layer.neuron.threshold))

        # The teacher first: then a layer's membranes, the largest tensors of the step, are gone
        # before the student's next layer adds to what backward needs.
        look = self.membrane_loss is not None
        teacher_logits = self.teacher(images, look and keep, of_logits)
        logits = self.student(images, membranes=look and compare)

        logits32, smoothing = at_least_float32(logits), self.label_smoothing
        terms = {
            "ce": F.cross_entropy(logits32, labels, label_smoothing=smoothing),
            "logit": logit_kl(logits, teacher_logits, self.tau),
        }
        loss = terms["ce"] + self.alpha * terms["logit"]
        if by_layer:
            terms["membrane"] = torch.stack(by_layer).mean()
            loss = loss + self.beta_now.to(loss) * terms["membrane"]
        return logits, loss, terms


@torch.no_grad()
def distance_to_teacher(
    teacher: SpikingNetwork, student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """How far a student's membranes are from its teacher's, in evaluation mode, over the student's
    timesteps, for which the teacher is run; of its potentials as they are, not `within_reach`.

    Returns three (layers, T) tensors, means over all images: "membrane_kl", "membrane_mse" and
    "differing_spikes", the share of neurons of which one fires and the other does not.
    """
    threshold = neuron_of(teacher).threshold
    distances = {
        "membrane_kl": lambda s, t: membrane_kl(s[None], t[None]),
        "membrane_mse": membrane_mse,
        "differing_spikes": lambda s, t: ((s > threshold) != (t > threshold)).float().mean(),
    }
    teacher.eval(), student.eval()
    sums, images_seen = dict.fromkeys(distances, 0), 0
    for images, _ in batches:
        _, u_student = student(images, membranes=True)
        with teacher.running_for(len(u_student[0])):
            _, u_teacher = teacher(images, membranes=True)
        layers = zip(u_student, u_teacher, strict=True)
        steps = [list(zip(*layer, strict=True)) for layer in layers]
        for name, distance in distances.items():
            batch = torch.tensor([[distance(*step) for step in layer] for layer in steps])
            sums[name] = sums[name] + batch * len(images)
        images_seen += len(images)
    return {name: total / images_seen for name, total in sums.items()}


def cross_entropy(network: nn.Module, label_smoothing: float = 0.0) -> LossFunction:
    """The loss of a network trained without a teacher."""

    def loss_function(images: Tensor, labels: Tensor):
        logits = network(images)
        logits32 = at_least_float32(logits)
        loss = F.cross_entropy(logits32, labels, label_smoothing=label_smoothing)
        return logits, loss, {"ce": loss}

    return loss_function
