"""Estimators that the findings compare with AGRPO and AGRPO-SA: parts of them, and the published code's draws.

Each is what `--algorithm experiments/draws.py:NAME` takes. All are unbiased but `papers_horizon`.
"""

from dataclasses import replace

import torch

import agrpo
import variants


def official(run, rewards, config, generator, step_rewards=None):
    """The draws of AGRPO's published code, stratified over the batch and shuffled, so that a completion may draw a step
    twice; horizon and mean are ours."""
    u = variants.stratified_over_batch(len(rewards), min(config.mc_samples, run.sampling_steps), generator)
    return variants.group_mean(run, rewards, config), agrpo.timestep_weights(agrpo.proposal(run, config), u)


def papers_horizon(run, rewards, config, generator, step_rewards=None):
    """The paper's horizon and mean, with low-discrepancy draws. Biased, as variants.paper is."""
    kept = (run.ids != run.eos_token_id) & (run.unmask_step >= 0)
    horizon = run.unmask_step.where(kept, 0).amax(1) + 1  # T (B,)
    weights = agrpo.sample_timesteps(replace(run, steps_taken=horizon), config, generator)
    return variants.group_mean(run, rewards, config), weights * run.sampling_steps / horizon[:, None]


def shared(run, rewards, config, generator, step_rewards=None):
    """Half of AGRPO-SA: its draws, with the group mean for a baseline."""
    advantages = variants.group_mean(run, rewards, config)
    return advantages, variants.shared_weights(run, advantages, config, generator)


def step_baseline(run, rewards, config, generator, step_rewards):
    """The other half: its baseline, with AGRPO's own draws."""
    advantages, _ = variants.agrpo_sa(run, rewards, config, torch.Generator(), step_rewards)  # its draws are not used
    return advantages, agrpo.sample_timesteps(run, config, generator)


def every_step(run, rewards, config, generator, step_rewards=None):
    """Draws nothing: for the contrasts, which have no timesteps."""
    return variants.group_mean(run, rewards, config), variants.executed_steps(run).double() / run.sampling_steps


step_baseline.needs_step_rewards = True
