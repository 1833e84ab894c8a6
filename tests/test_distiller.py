"""Losses by hand and against PyTorch's own, and what the Distiller promises."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F

import reference
from checkpoints import build_network
from distiller import (
    MEMBRANE_LOSSES,
    Distiller,
    distance_to_teacher,
    logit_kl,
    membrane_kl,
    membrane_mse,
    start_membrane_steps,
    teacher_steps,
    within_reach,
)
from kernels import integer_codes
from load_settings import parse_settings
from models import MSResNet, QuanMSResNet
from models.batch_norm import BatchNorm, estimate_statistics
from models.layers import Layers
from models.neuron import DEFAULT_NEURON, LIF, Neuron, neuron_of
from quantization import MembraneQuantizer

THRESHOLD = DEFAULT_NEURON.threshold
LOG3 = math.log(3)


def test_logit_kl_by_hand(device):
    # softmax([log 3, 0]) = (3/4, 1/4), softmax([0, 0]) = (1/2, 1/2); the second image agrees
    student = torch.tensor([[0.0, 0.0], [1.0, 2.0]]).double().to(device)
    teacher = torch.tensor([[LOG3, 0.0], [1.0, 2.0]], dtype=torch.float64, device=device)
    one_image = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert logit_kl(student, teacher, tau=1.0).item() == pytest.approx(one_image / 2)
    # twice the logits at tau = 2 are the same distributions, and tau² weighs them
    assert logit_kl(2 * student, 2 * teacher, tau=2.0).item() == pytest.approx(4 * one_image / 2)


def test_membrane_kl_by_hand(device):
    # one layer, T = 2, B = 1, two neurons; the timesteps differ from the teacher's in turn
    student, teacher = (
        torch.tensor(values, dtype=torch.float64, device=device).view(2, 1, 2, 1, 1)
        for values in ([0.0, 0.0, 1.0, 1.0], [LOG3, 0.0, 5.0, 5.0])
    )
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert membrane_kl(student, teacher).item() == pytest.approx(one / 2)


def test_membrane_mse_by_hand(device):
    student = torch.tensor([0.0, 1.0], device=device).view(1, 1, 2, 1, 1)
    teacher = torch.tensor([2.0, 1.0], device=device).view(1, 1, 2, 1, 1)
    assert membrane_mse(student, teacher).item() == 2.0


def test_a_shift_of_a_whole_layer_costs_what_it_does_to_the_threshold():
    # Two neurons and the threshold, which weighs as much as two: in quarters, before and after.
    teacher = torch.full((1, 1, 2, 1, 1), THRESHOLD, dtype=torch.float64)
    student = teacher + LOG3
    assert membrane_kl(student, teacher).item() == pytest.approx(0, abs=1e-12)
    neurons = 0.5 * math.log(0.5 / 0.75)  # each a quarter of the mass, then three eighths
    threshold = 0.5 * math.log(0.5 / 0.25)
    found = MEMBRANE_LOSSES["CLK"](student, teacher, THRESHOLD).item()
    assert found == pytest.approx(neurons + threshold)


@pytest.mark.parametrize("threshold", [-math.inf, THRESHOLD, 40.0])
@pytest.mark.parametrize("channels_last", [True, False])
def test_membrane_kl_and_its_gradient_equal_autograd(channels_last, threshold, device):
    torch.manual_seed(0)
    u = torch.randn(3 * 2, 4, 5, 5, dtype=torch.float64).to(device)
    if channels_last:
        u = u.to(memory_format=torch.channels_last)
    student = u.clone().unflatten(0, (3, 2)).requires_grad_()
    teacher = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64).to(device)
    loss = membrane_kl(student, teacher, threshold)
    plain = student.detach().clone().requires_grad_()
    rows = [x.flatten(2) for x in (plain, teacher)]
    if threshold > -math.inf:
        rows = [F.pad(x, (0, 1), value=threshold + math.log(4 * 5 * 5)) for x in rows]
    log_p_student, log_p_teacher = (x.log_softmax(2) for x in rows)
    expected = F.kl_div(log_p_student, log_p_teacher, reduction="sum", log_target=True) / (3 * 2)
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(student.grad, plain.grad)


def networks():
    torch.manual_seed(0)
    return MSResNet(18, 4, 2, 1, 4), QuanMSResNet(18, 4, 2, 1, 4, bits=4)


@pytest.mark.parametrize("loss", ["CLK", "CLM", "CL"])
def test_the_loss_is_the_weighted_sum_of_its_terms_and_trains_the_student_alone(loss):
    teacher, student = networks()
    distiller = Distiller(teacher, student, loss, alpha=0.5, beta=3.0, tau=2.0)
    logits, total, terms = distiller(torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2]))
    expected = terms["ce"] + 0.5 * terms["logit"] + 3.0 * terms.get("membrane", 0)
    torch.testing.assert_close(total, expected)
    assert set(terms) == {"ce", "logit"} | ({"membrane"} if loss != "CL" else set())
    assert logits.shape == (3, 4)
    total.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training  # a copy of it is evaluated


def test_a_layers_membranes_are_gone_when_the_students_next_layer_starts():
    teacher, student = networks()
    distiller = Distiller(teacher, student)
    seen: list[weakref.ref] = []

    def watched(u_student, u_teacher, threshold):
        seen.extend(weakref.ref(u) for u in (u_student, u_teacher))
        return membrane_kl(u_student, u_teacher, threshold)

    def start_of_layer(*_):
        still_there.append([u for u in seen if u() is not None])

    still_there: list[list] = []
    for module in student.modules():
        if isinstance(module, LIF):
            module.register_forward_pre_hook(start_of_layer)
    distiller.membrane_loss = watched
    _, total, _ = distiller(torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2]))
    assert len(seen) == 2 * 17
    assert still_there == [[]] * 17
    total.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_second_backward_through_the_membrane_loss_is_refused_not_wrong():
    u = torch.randn(2, 1, 3, 1, 1, requires_grad=True)
    loss = membrane_kl(u, torch.randn(2, 1, 3, 1, 1))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("schedule", "shares"), [("cosine", [1.0, 0.75, 0.25]), ("constant", [1.0, 1.0, 1.0])]
)
def test_beta_follows_its_schedule_over_the_epochs(schedule, shares):
    distiller = Distiller(*networks(), alpha=0.0, beta=8.0, beta_schedule=schedule)
    batch = torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2])
    for epoch, share in enumerate(shares, start=1):
        distiller.set_epoch(epoch, epochs=3)
        _, total, terms = distiller(*batch)
        torch.testing.assert_close(total, terms["ce"] + 8 * share * terms["membrane"])


def test_losses_are_float32_under_bfloat16_autocast(device):
    distiller = Distiller(*(network.to(device) for network in networks()))
    images, labels = torch.rand(3, 1, 16, 16).to(device), torch.tensor([0, 1, 2], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        _, total, terms = distiller(images, labels)
    assert {total.dtype, *(term.dtype for term in terms.values())} == {torch.float32}


def test_the_distance_is_a_mean_over_images_and_the_students_steps_however_they_come():
    teacher, student = networks()
    x = torch.rand(4, 1, 16, 16)
    whole = distance_to_teacher(teacher, student, [(x, None)])
    parts = distance_to_teacher(teacher, student, [(x[:1], None), (x[1:], None)])
    none = distance_to_teacher(teacher, teacher, [(x, None)])
    teacher.time_window = 5
    longer = distance_to_teacher(teacher, student, [(x, None)])
    assert teacher.time_window == 5
    assert set(whole) == {"membrane_kl", "membrane_mse", "differing_spikes"}
    for name, found in whole.items():
        assert found.shape == (17, 2)  # LIF layers, timesteps
        assert (found[0] > 0).all()
        assert none[name].abs().max() < 1e-6
        torch.testing.assert_close(found, parts[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(found, longer[name])
    assert whole["differing_spikes"].max() <= 1


@pytest.mark.parametrize("loss", ["CLK", "CLM"])
@pytest.mark.parametrize("bits", [2, 4])
def test_what_no_code_of_the_student_holds_does_not_weigh_in_the_loss(loss, bits):
    """The softmax of membranes that reach to 9 is that of those alone, whatever the others do."""
    torch.manual_seed(0)
    neuron = LIF(DEFAULT_NEURON, MembraneQuantizer(bits, THRESHOLD))
    quantizer, step = neuron.quantizer, neuron.quantizer.used_step()
    inside = torch.rand(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    u = (quantizer.low + inside * (quantizer.high - quantizer.low)) * step
    beyond = u.clone()
    beyond[:, :, 0, 0, 0], beyond[:, :, 1, 0, 0] = 9.0, -9.0
    at_the_end = u.clone()
    at_the_end[:, :, 0, 0, 0] = quantizer.high * step
    at_the_end[:, :, 1, 0, 0] = quantizer.low * step
    assert torch.equal(within_reach(beyond.clone(), neuron), at_the_end)
    assert torch.equal(within_reach(u.clone(), neuron), u)
    # So what the student can reach is its own rounding.
    rounded = integer_codes(beyond, step, quantizer.low, quantizer.high) * step
    membrane_loss = {"CLK": membrane_kl, "CLM": membrane_mse}[loss]
    reached = membrane_loss(rounded, within_reach(beyond.clone(), neuron))
    assert reached < step**2 / 12 * 1.3  # the variance of a uniform error, and for the KL its half
    assert membrane_loss(rounded, beyond) > 10 * reached


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_membrane_steps_start_where_the_codes_come_nearest_to_the_teachers_potentials(reset):
    torch.manual_seed(0)
    neuron = Neuron(threshold=0.75, reset=reset)
    teacher = MSResNet(18, 4, 3, 1, 4, Layers(neuron=neuron))
    student = QuanMSResNet(18, 4, 2, 1, 4, bits=4, neuron=neuron)
    for i, norm in enumerate(x for x in teacher.modules() if isinstance(x, BatchNorm)):
        norm.weight.data *= 1 + 2 * (i % 3)  # some layers reach far, others do not
    images = torch.rand(5, 1, 16, 16)
    start_membrane_steps(student, teacher, images)
    with torch.no_grad(), teacher.eval().running_for(2):
        _, membranes = teacher(images, membranes=True)
    found = []
    for layer, u in zip(student.neurons().values(), membranes, strict=True):
        u, errors = u.double(), {}
        for step in (2 * 0.75 / 7, 0.75 / 1.5, 2 * 0.75):
            errors[step] = ((u / step).round().clamp(-8, 7) * step - u).square().mean()
        found.append(min(errors, key=errors.get))
        assert layer.quantizer.used_step().item() == pytest.approx(found[-1], rel=1e-3)
    assert len(set(found)) > 1


def test_membranes_of_two_bits_or_of_full_precision_have_no_other_steps():
    teacher, _ = networks()
    student = QuanMSResNet(18, 4, 2, 1, 4, bits=2)
    before = [x.quantizer.step.item() for x in student.neurons().values()]
    start_membrane_steps(student, teacher, 50 * torch.rand(3, 1, 16, 16))
    assert [x.quantizer.step.item() for x in student.neurons().values()] == before
    start_membrane_steps(MSResNet(18, 4, 2, 1, 4), teacher, torch.rand(3, 1, 16, 16))


# A teacher of another T.

IN_FORWARD_ORDER = [f"blocks.{block}.lif{i}" for block in range(8) for i in (1, 2)] + ["lif"]


class Evaluated(reference.FullPrecision):
    """The naive network with the running statistics of a state_dict."""

    def bn(self, name, xs):
        values = (self.weights[f"{name}.{x}"] for x in ("weight", "bias", "running_mean"))
        weight, bias, mean = (x.view(-1, 1, 1) for x in values)
        var = self.weights[f"{name}.running_var"].view(-1, 1, 1)
        return [(x - mean) / torch.sqrt(var + reference.EPS) * weight + bias for x in xs]


def naive_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) of two vectors."""
    p, q = (torch.exp(x - x.max()) for x in (teacher, student))
    p, q = p / p.sum(), q / q.sum()
    return (p * (p / q).log()).sum()


def naive_loss(teacher, student, frames, labels, T_S, T_T, loss, alpha, beta, tau):
    """(student's gradients by name, loss), in plain loops; `frames`: the image of each timestep, as
    many as the longer of both T."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in student.named_parameters()}
    neuron = neuron_of(student)
    z_student, u_student = reference.ms_resnet(
        reference.Quantized(weights, T_S, 4, 8, neuron), 18, frames[:T_S]
    )
    frozen = {name: x.detach() for name, x in teacher.state_dict().items()}
    z_teacher, _ = reference.ms_resnet(Evaluated(frozen, T_T, neuron), 18, frames[:T_T])
    _, u_teacher = reference.ms_resnet(Evaluated(frozen, len(frames), neuron), 18, frames)
    steps = [student.get_submodule(name).quantizer.used_step() for name in IN_FORWARD_ORDER]
    B, total, beyond = len(labels), 0, 0
    for b in range(B):
        total = total - z_student[b].log_softmax(0)[labels[b]] / B
        total = total + alpha * tau**2 * naive_kl(z_student[b] / tau, z_teacher[b] / tau) / B
    for ours, theirs, step in zip(u_student, u_teacher, steps, strict=True):
        beyond += (theirs[:T_S] > 7 * step).any().item()  # 4 bits
        theirs = theirs.clamp(-8 * step, 7 * step)
        for t in range(T_S):
            for b in range(B):
                one, other = ours[t, b].flatten(), theirs[t, b].flatten()
                if loss == "CLK":
                    threshold = one.new_full((len(one),), neuron.threshold)
                    threshold = threshold.logsumexp(0, keepdim=True)
                    term = naive_kl(torch.cat([one, threshold]), torch.cat([other, threshold]))
                else:
                    term = ((one - other) ** 2).mean() if loss == "CLM" else 0
                total = total + beta * term / (len(u_student) * T_S * B)
    assert beyond > 5  # layers
    total.backward()
    return {name: x.grad for name, x in weights.items()}, total.detach()


def with_statistics(T: int, images: torch.Tensor, neuron: Neuron = DEFAULT_NEURON) -> MSResNet:
    """A teacher whose running statistics are those of the images."""
    torch.manual_seed(0)
    teacher = MSResNet(18, 4, T, images.shape[-3], 4, Layers(neuron=neuron)).double()
    estimate_statistics(teacher, [images], (T,))
    return teacher


@pytest.mark.parametrize("loss", ["CLK", "CLM", "CL"])
@pytest.mark.parametrize(("T_S", "T_T"), [(3, 3), (2, 4), (4, 2), (4, 1)])
def test_a_teacher_of_another_t_gives_the_loss_of_plain_loops(loss, T_S, T_T):
    assert_loss_of_plain_loops(loss, T_S, T_T, DEFAULT_NEURON)


@pytest.mark.parametrize("loss", ["CLK", "CLM"])
def test_networks_of_another_neuron_have_the_loss_of_plain_loops(loss):
    neuron = Neuron(leak=0.5, threshold=0.75, reset="soft", surrogate="triangle")
    assert_loss_of_plain_loops(loss, 3, 3, neuron)


def test_spikes_that_differ_are_counted_at_the_networks_threshold():
    neuron = Neuron(threshold=0.75)
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = with_statistics(2, x, neuron).eval()
    student = QuanMSResNet(18, 4, 2, 1, 4, bits=4, neuron=neuron).double().eval()
    found = distance_to_teacher(teacher, student, [(x, None)])["differing_spikes"]
    pairs = zip(student(x, membranes=True)[1], teacher(x, membranes=True)[1], strict=True)
    expected = [((s > 0.75) != (u > 0.75)).double().mean(dim=(1, 2, 3, 4)) for s, u in pairs]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-6, atol=0)


def assert_loss_of_plain_loops(loss, T_S, T_T, neuron) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 3])
    teacher = with_statistics(T_T, images, neuron)
    student = QuanMSResNet(18, 4, T_S, 1, 4, bits=4, neuron=neuron).double()
    with torch.no_grad():  # the range of each layer's codes is its own
        for number, name in enumerate(IN_FORWARD_ORDER):
            student.get_submodule(name).quantizer.step *= 0.65 + number / 30
    weights = {"alpha": 0.5, "beta": 3.0, "tau": 2.0}
    distiller = Distiller(teacher, student, loss, **weights)
    steps = []
    distiller.teacher.lif.register_forward_pre_hook(lambda _, inputs: steps.append(inputs[1]))
    _, total, _ = distiller(images, labels)
    total.backward()
    frames = [images] * max(T_S, T_T)
    gradients, expected = naive_loss(teacher, student, frames, labels, T_S, T_T, loss, **weights)
    torch.testing.assert_close(total.detach(), expected, rtol=1e-9, atol=0)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-10)
    # It runs once, and for no step that nobody looks at.
    assert steps == [T_T if loss == "CL" else max(T_T, T_S)]


@pytest.mark.parametrize("T_T", [1, 2, 5])
def test_on_events_the_teacher_runs_on_the_frames_of_the_student(T_T):
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 9, (3, 2, 2, 8, 8), generator=generator).double()  # T = 2
    teacher = with_statistics(2, frames)
    student = QuanMSResNet(18, 4, 2, 2, 4, bits=4, image_step=1.0).double()
    labels = torch.tensor([0, 1, 3])
    expected = Distiller(teacher, student)(frames, labels)[1]
    teacher.time_window = T_T
    assert torch.equal(Distiller(teacher, student)(frames, labels)[1], expected)


def test_a_teacher_runs_no_longer_than_somebody_looks_at_it():
    assert teacher_steps(2, 4, "CLK") == teacher_steps(2, 4, "CL") == (4, 4)
    assert teacher_steps(4, 2, "CLK") == (4, 2)
    assert teacher_steps(4, 2, "CL") == (2, 2)
    assert teacher_steps(2, 4, "CLK", events=True) == (2, 2)


def test_what_a_code_of_the_membranes_stands_for_is_not_learned_from_the_distance_to_a_teacher():
    """L_mem would be smallest where the range is: within_reach follows it."""
    common = ["--data", "digits", "--width", "4", "--save_path", "run"]
    of_teacher = parse_settings([*common, "--paper_setting", "original"])
    taught = ["--paper_setting", "qamd", "--teacher_path", "teacher.pth", "--loss"]
    for method in (["--paper_setting", "student"], [*taught, "CL"], [*taught, "CLK"]):
        settings = parse_settings([*common, "--bits", "2", *method], teacher=of_teacher)
        student = build_network(settings)
        learned = [x.quantizer.step.requires_grad for x in student.modules() if type(x) is LIF]
        assert learned == [method[-1] != "CLK"] * 17
        images, labels = torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2])
        teacher = MSResNet(18, 10, 4, 1, 4)
        Distiller(teacher, student, settings.loss or "CL")(images, labels)[1].backward()
        steps = [x.quantizer.step for x in student.modules() if type(x) is LIF]
        assert all((x.grad is not None) == (method[-1] != "CLK") for x in steps)
        assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
