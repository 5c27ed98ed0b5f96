"""The objective: what is noised, what the network should say, and the sampler that fits it."""

import pytest
import torch

from config import ObjectiveConfig
from train.objective import PREDICTIONS, Objective, sampling_scheduler


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def draw(prediction_type: str, process: str):
    clean = torch.randn(5, 3, 4, 4)
    config = ObjectiveConfig(process=process, prediction_type=prediction_type)
    return clean, Objective(config)(clean, generators(len(clean)))


def test_flow_velocity_leads_from_the_input_to_the_clean_picture():
    clean, noised = draw("flow_prediction", "flow")
    sigma = (noised.timestep / 1000)[:, None, None, None]
    torch.testing.assert_close(noised.inputs - sigma * noised.target, clean)
    assert torch.equal(noised.weight, torch.ones(5))


def test_flow_sample_loss_equals_the_velocity_loss_of_the_same_prediction():
    clean, noised = draw("sample", "flow")
    sigma = (noised.timestep / 1000)[:, None, None, None]
    noise = (noised.inputs - (1 - sigma) * clean) / sigma
    guess = clean + 0.1 * torch.randn_like(clean)
    velocity_error = (noised.inputs - guess) / sigma - (noise - clean)
    expected = velocity_error.square().mean()
    torch.testing.assert_close(noised.losses(guess).mean(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "sample"])
def test_a_recoloured_start_is_noised_where_noise_is_strong_and_leads_to_the_clean_picture(prediction_type):
    clean, source = torch.randn(2, 50, 3, 4, 4)
    config = ObjectiveConfig(prediction_type=prediction_type, recolour_sigma=0.5)
    plain, noised = (Objective(config)(clean, generators(len(clean)), start) for start in (None, source))
    sigma = (noised.timestep / 1000)[:, None, None, None]
    strong = sigma.flatten() >= 0.5
    assert 5 < strong.sum() < 45
    torch.testing.assert_close(noised.inputs - plain.inputs, torch.where(sigma >= 0.5, 1 - sigma, 0) * (source - clean))
    reached = noised.target if prediction_type == "sample" else noised.inputs - sigma * noised.target
    torch.testing.assert_close(reached, clean, rtol=1e-4, atol=1e-4)
    assert torch.equal(noised.target[~strong], plain.target[~strong])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_diffusion_targets_recover_the_clean_picture(prediction_type):
    clean, noised = draw(prediction_type, "diffusion")
    betas = torch.linspace(1e-4, 0.02, 1000)
    alpha_bar = torch.cumprod(1 - betas, 0)[noised.timestep.long()][:, None, None, None]
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    recovered = {
        "epsilon": lambda: (noised.inputs - s * noised.target) / a,
        "v_prediction": lambda: a * noised.inputs - s * noised.target,
        "sample": lambda: noised.target,
    }[prediction_type]()
    torch.testing.assert_close(recovered, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("process", "prediction_type"),
    [("flow", "flow_prediction"), ("flow", "sample"), ("diffusion", "epsilon"), ("diffusion", "v_prediction")],
)
def test_the_sampler_returns_the_picture_of_a_perfect_network(process, prediction_type):
    """A network that always knows the clean picture must lead the sampler to exactly that picture."""
    config = ObjectiveConfig(process=process, prediction_type=prediction_type)
    scheduler = sampling_scheduler(config)
    scheduler.set_timesteps(20)
    clean, state = torch.rand(1, 3, 4, 4) * 2 - 1, torch.randn(1, 3, 4, 4)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for timestep in scheduler.timesteps:
        if process == "flow":
            # the sigma that the scheduler is at; its timesteps may be rounded to whole numbers
            sigma = scheduler.sigmas[scheduler.step_index or 0]
            prediction = clean if prediction_type == "sample" else (state - clean) / sigma
        else:
            a, s = alpha_bar[int(timestep)].sqrt(), (1 - alpha_bar[int(timestep)]).sqrt()
            noise = (state - a * clean) / s
            prediction = noise if prediction_type == "epsilon" else a * noise - s * clean
        state = scheduler.step(prediction, timestep, state).prev_sample
    torch.testing.assert_close(state, clean, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
@pytest.mark.parametrize("process", ["diffusion", "flow"])
def test_a_weighting_means_the_same_whatever_the_network_predicts(weighting, process):
    """One wrong picture costs the same as the noise or velocity that it implies; and it costs what the papers say."""
    clean, wrong = torch.randn(2, 64, 3, 4, 4)
    costs = {}
    for kind in PREDICTIONS[process]:
        config = ObjectiveConfig(process=process, prediction_type=kind, loss_weighting=weighting, min_sigma=1e-4)
        noised = Objective(config)(clean, generators(len(clean)))
        if process == "flow":
            s = (noised.timestep / 1000)[:, None, None, None]
            a = 1 - s
        else:
            alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[noised.timestep][:, None, None, None]
            a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noise = (noised.inputs - a * wrong) / s
        said = {
            "sample": wrong,
            "epsilon": noise,
            "v_prediction": a * noise - s * wrong,
            "flow_prediction": noise - wrong,
        }
        costs[kind] = noised.losses(said[kind])
        snr = ((a / s) ** 2).flatten()
        error = (wrong - clean).square().mean(dim=(1, 2, 3))
        paper = {"min_snr": snr.clamp(max=5), "p2": 1 / (1 + snr) * snr}[weighting]
        torch.testing.assert_close(costs[kind], paper * error, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_the_weightings_of_flow_are_those_of_stable_diffusion_3(weighting):
    clean = torch.randn(64, 3, 4, 4)
    noised = Objective(ObjectiveConfig(loss_weighting=weighting))(clean, generators(len(clean)))
    s = (noised.timestep / 1000).clamp(min=0.05)
    expected = {"sigma_sqrt": s**-2, "cosmap": 2 / (torch.pi * (1 - 2 * s + 2 * s**2))}[weighting]
    torch.testing.assert_close(noised.weight, expected)
    with pytest.raises(ValueError, match=f"loss_weighting='{weighting}' needs process='flow'"):
        Objective(ObjectiveConfig(process="diffusion", prediction_type="epsilon", loss_weighting=weighting))


@pytest.mark.parametrize("density", ["logit_normal", "mode", "uniform"])
def test_timesteps_follow_the_density_and_larger_pictures_get_more_noise(density):
    def drawn(**settings) -> torch.Tensor:
        config = ObjectiveConfig(timestep_density=density, **settings)
        return Objective(config)(torch.zeros(2000, 1, 8, 8), generators(2000)).timestep / 1000

    plain = drawn()
    assert plain.min() > 0 and plain.max() < 1
    u = torch.linspace(0, 1, 9999)
    quantiles = {
        "logit_normal": torch.special.ndtri(u).sigmoid(),
        "uniform": u,
        "mode": 1 - u - 1.29 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u),
    }[density]
    for share in (0.25, 0.5, 0.75):
        assert abs(plain.quantile(share) - quantiles.quantile(share)) < 0.03
    torch.testing.assert_close(drawn(shift_resolution=8), plain)
    torch.testing.assert_close(drawn(shift_resolution=4), 2 * plain / (1 + plain))


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "sample"])
def test_flow_shift_moves_the_samplers_sigmas(prediction_type):
    plain, shifted = (sampling_scheduler(ObjectiveConfig("flow", prediction_type, flow_shift=x)) for x in (1.0, 2.0))
    for scheduler in (plain, shifted):
        scheduler.set_timesteps(20)
    expected = 2 * plain.sigmas / (1 + plain.sigmas)
    torch.testing.assert_close(shifted.sigmas, expected, rtol=1e-2, atol=1e-2)
    assert (shifted.sigmas[1:-1] > plain.sigmas[1:-1]).all()


def test_unsuitable_prediction_type_names_the_suitable_ones():
    with pytest.raises(ValueError, match="epsilon.*flow.*flow_prediction"):
        Objective(ObjectiveConfig(process="flow", prediction_type="epsilon"))
