"""Losses by hand and against PyTorch's own, and what the Distiller promises."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from distiller import (
    Distiller,
    distance_to_teacher,
    logit_kl,
    membrane_kl,
    membrane_mse,
)
from models import MSResNet, QuanMSResNet
from models.neuron import LIF
from quantization import as_rows

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
    assert membrane_kl([student], [teacher]).item() == pytest.approx(one / 2)
    two_layers = membrane_kl([student, student], [teacher, student])
    assert two_layers.item() == pytest.approx(one / 4)


def test_membrane_mse_by_hand(device):
    student = torch.tensor([0.0, 1.0], device=device).view(1, 1, 2, 1, 1)
    teacher = torch.tensor([2.0, 1.0], device=device).view(1, 1, 2, 1, 1)
    assert membrane_mse([student], [teacher]).item() == 2.0
    assert membrane_mse([student, student], [teacher, student]).item() == 1.0


@pytest.mark.parametrize("channels_last", [True, False])
def test_membrane_kl_and_its_gradient_equal_autograd(channels_last, device):
    torch.manual_seed(0)
    u = torch.randn(3 * 2, 4, 5, 5, dtype=torch.float64).to(device)
    if channels_last:
        u = u.to(memory_format=torch.channels_last)
    student = u.clone().unflatten(0, (3, 2)).requires_grad_()
    teacher = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64).to(device)
    loss = membrane_kl([student], [teacher])
    plain = student.detach().clone().requires_grad_()
    log_p_student, log_p_teacher = (x.flatten(2).log_softmax(2) for x in (plain, teacher))
    expected = F.kl_div(log_p_student, log_p_teacher, reduction="sum", log_target=True) / (3 * 2)
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(student.grad, plain.grad)


def test_the_networks_membranes_reach_the_softmax_without_a_copy():
    _, membranes = MSResNet(18, 4, 2, 1, 4)(torch.rand(2, 1, 16, 16), membranes=True)
    for u in membranes:
        assert as_rows(u.flatten(0, 1)).data_ptr() == u.data_ptr()


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

    def watched(u_student, u_teacher):
        seen.extend(weakref.ref(u) for u in (u_student[0], u_teacher[0]))
        return membrane_kl(u_student, u_teacher)

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
    loss = membrane_kl([u], [torch.randn(2, 1, 3, 1, 1)])
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


def test_a_network_has_no_distance_to_itself_and_the_quantized_one_has():
    teacher, student = networks()
    batches = [(torch.rand(3, 1, 16, 16), None), (torch.rand(1, 1, 16, 16), None)]
    same = distance_to_teacher(teacher, teacher, batches)
    other = distance_to_teacher(teacher, student, batches)
    assert set(same) == {"membrane_kl", "membrane_mse", "differing_spikes"}
    for name in same:
        assert same[name].shape == (17, 2)  # LIF layers, timesteps
        assert same[name].abs().max() < 1e-6
        assert (other[name][0] > 0).all()
    assert other["differing_spikes"].max() <= 1


def test_the_distance_is_a_mean_over_images_however_they_are_batched():
    teacher, student = networks()
    x = torch.rand(4, 1, 16, 16)
    whole = distance_to_teacher(teacher, student, [(x, None)])
    parts = distance_to_teacher(teacher, student, [(x[:1], None), (x[1:], None)])
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)
