"""An estimator of one's own: the k steps of lowest entropy, each with the weight of a uniform draw.

python experiments/oracle.py experiments/my_estimate.py:lowest_entropy     is it the policy gradient?
python train.py --algorithm experiments/my_estimate.py:lowest_entropy      what does it learn?
"""

import agrpo


def lowest_entropy(run, rewards, config, generator, step_rewards=None):
    """Advantages (B, m) as agrpo.estimate has them; weights (B, m). Where the model is sure it should be right."""
    advantages, _ = agrpo.estimate(run, rewards, config, generator)
    executed = agrpo.proposal(run, config) > 0  # (B, m): the steps that were taken
    H = run.step_entropies().where(executed, float("inf"))
    chosen = executed & (H.argsort(1).argsort(1) < config.mc_samples)
    return advantages, chosen / chosen.sum(1, keepdim=True) * executed.sum(1, keepdim=True) / run.sampling_steps
