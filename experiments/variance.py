"""How noisy is each estimator on the real tiny tasks? (estimators.py variance)

A batch is rolled out, and the score grad log pi(a_t | s_t) of every step of every completion is computed: B m vectors.
Every estimator of the policy gradient is a weighted sum of them, so what drawing k timesteps per completion adds to its
variance needs no sampling: it follows from the products of the scores of one completion, and for draws that depend on
each other across the batch from an integral over their uniforms. What is left, the variance of the full sum over
prompts, completions and orders, is measured from batch to batch. All estimators see the same completions.
"""

from dataclasses import replace

import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import agrpo
import train
from experiments.exact import replaced, timestep_draws

GROUP_MEAN, RAMP = "group mean", "c_t = t / m, gate"
ENTROPY, OFFICIAL, BATCH = "entropy, low discrepancy", "official: entropy, batch-stratified", "allocation batch"


def step_scores(model, run, config, chunk=128):
    """S (B, m, parameters): grad log pi(a_t | s_t), for completions without early stop or padding."""
    batch, m, n = len(run.unmask_step), config.sampling_steps, config.completion_length
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_pi(parameters, ids, chosen, tokens):
        logits = functional_call(model, parameters, (ids[None],))[0, -n:]  # (n, V)
        logp = agrpo.token_logprobs(logits, run.mask_token_id, config.temperature)
        return (logp.gather(1, tokens[:, None]).squeeze(1) * chosen).sum()

    score = vmap(grad(log_pi), in_dims=(None, 0, 0, 0))
    S = torch.empty(batch, m, sum(p.numel() for p in parameters.values()))
    with sdpa_kernel(SDPBackend.MATH):  # the one that vmap can batch
        for t in range(m):
            at = torch.full((batch,), t)
            chosen, tokens, _ = run.action_at(at)
            for rows in torch.arange(batch).split(chunk):
                parts = score(parameters, run.state_at(at)[rows], chosen[rows], tokens[rows])
                S[rows, t] = torch.cat([part.flatten(1) for part in parts.values()], 1)
    return S


def largest_probabilities(model, run, config):
    """(B, n): probability of the likeliest token where each token was drawn."""
    top = torch.zeros_like(run.logprobs)
    for t in range(config.sampling_steps):
        at = torch.full((len(top),), t)
        chosen = run.unmasked_at(at)
        with torch.no_grad():
            logits = agrpo.logits_at(model, run.state_at(at), run.prompt_mask, chosen)
        top[chosen] = agrpo.token_logprobs(logits, run.mask_token_id, config.temperature).exp().amax(1).double()
    return top


def proposals(H, doubt, A, norms, running):
    """{name: q (B, m) float64, rows sum to 1}: the ways to draw timesteps.

    H entropy, doubt 1 - largest probability (of the tokens of a step), A advantage, norms of the score, all (B, m);
    running (m,): mean norm of A times the score at each step of earlier batches."""
    unnormalised = {
        "uniform": torch.ones_like(H),
        "entropy": H,
        "entropy, 10% uniform": 0.9 * H / H.sum(1, keepdim=True) + 0.1 / H.shape[1],
        "entropy, 30% uniform": 0.7 * H / H.sum(1, keepdim=True) + 0.3 / H.shape[1],
        "square root of entropy": H.sqrt(),
        "1 - largest probability": doubt + 1e-8,
        "entropy x |A_t|": H * A.abs() + 1e-8,
        "square root of entropy x |A_t|": H.sqrt() * A.abs() + 1e-8,
        "gradient norm of the step, running mean": running.expand_as(H),
        "oracle: |A_t| x norm of the score": norms * A.abs() + 1e-12,
    }
    return {name: q / q.sum(1, keepdim=True) for name, q in unnormalised.items()}


def added_by_draws(q, A, K, k, run, config, stratified):
    """sum over completions of E||sum_j w_j A_t S_t - sum_t A_t S_t||^2, exactly; K (B, m, m) products of scores."""
    products = A[:, :, None] * K * A[:, None, :]  # (B, m, m)
    mean_square = products.sum((1, 2))
    if not stratified:  # independent draws
        return ((products.diagonal(dim1=1, dim2=2) / q).sum(1) - mean_square).sum().item() / k
    total, m = 0.0, q.shape[1]
    config = replace(config, mc_samples=k, low_discrepancy=True)
    with replaced("proposal", lambda *_: q):
        for probability, steps, weights in timestep_draws(run, config):
            w = torch.zeros_like(q).scatter_add(1, steps, weights * m)
            total += (probability * torch.einsum("bs,bst,bt->b", w, products, w)).sum().item()
    return total - mean_square.sum().item()


def added_by_official(q, A, S, K, k, run, config, bins=64):
    """The same for the official code's draws, stratified over the batch and shuffled: N = B k uniforms, one in each of
    N strata, so that two draws never share a stratum.

    The mean terms f_j(s) of draws j in a stratum s are then anticorrelated, and the variance of independent draws falls
    by (Var_s sum_j f_j - sum_j Var_s f_j) / (N - 1). Exact with N bins; fewer are faster, and coarser only in this
    fall, of less than a hundredth."""
    independent = added_by_draws(q, A, K, k, run, config, stratified=False)
    ends = torch.cat([torch.zeros(len(q), 1), q.cumsum(1)], 1).double()  # (B, m + 1)
    edges = torch.arange(bins + 1, dtype=torch.float64)[:, None, None] / bins
    inside = ends.clamp(edges[:-1], edges[1:]).diff(dim=2) * bins  # (bins, B, m) share of the bin that draws step t
    h = (inside / q * A).flatten(1).float() @ S.flatten(0, 1)  # (bins, parameters)
    together = (h - h.mean(0)).double().square().sum(1).mean()
    each = inside / q * A - A
    alone = torch.einsum("abs,bst,abt->", each, K, each) / bins / k  # k draws of a completion, each weighed by 1 / k
    return independent - (together - alone).item() / (len(q) * k - 1)


def distinct_draws(q, A, k):
    """Expected number of steps to compute when k are drawn independently from q (B, m) by completions with A != 0."""
    return ((1 - (1 - q) ** k) * (A != 0)).sum().item()


def added_by_batch(p, A, S):
    """The same for allocation batch, exactly: the steps taken change one by one as U goes from 0 to 1."""
    terms, p = (A.float().flatten()[:, None] * S.flatten(0, 1)), p.flatten()
    index = p.nonzero()[:, 0]
    weight = 1 / p[index]
    # Where an end meets an integer - U, in (0, 1]: step `order` comes in there, and the one after it goes out.
    at, order = (1 - p[index].cumsum(0) % 1).sort()
    error = -terms.sum(0)  # of U = 0
    for i, w, taken in zip(index.tolist(), weight.tolist(), agrpo.systematic_draw(p[index], torch.zeros(())).tolist()):
        if taken:
            error += w * terms[i]
    total, before = 0.0, 0.0
    for U, j in zip(at.tolist(), order.tolist()):
        total, before = total + (U - before) * error.double().square().sum().item(), U
        error += weight[j].item() * terms[index[j]]
        if j + 1 < len(index):
            error -= weight[j + 1].item() * terms[index[j + 1]]
    return total + (1 - before) * error.double().square().sum().item()


class Fit:
    """The c that would have been best in the batches so far: least E[H_t (A - c x_t)^2], for all steps or for each."""

    def __init__(self, m):
        self.products, self.squares = torch.zeros(m, dtype=torch.float64), torch.full((m,), 1e-12, dtype=torch.float64)

    def add(self, plain, x, H):
        self.products += (H * plain * x).sum(0)
        self.squares += (H * x * x).sum(0)

    def common(self):
        """One c; before there is a batch, EGSPO-SA's."""
        return (self.products.sum() / self.squares.sum()).item() or 1 / 3

    def each(self):
        return self.products / self.squares  # (m,)


def advantages_of(R, r, taken, G, config, fit):
    """{baseline: A (B, m) float64}."""
    plain = agrpo.group_advantages(R, G)[:, None].expand_as(r)
    ramp = agrpo.step_coefficients(replace(config, step_baseline="ramp"))

    def stepwise(c, gate):
        return agrpo.stepwise_advantages(R, r, taken, G, c, gate)

    return {
        GROUP_MEAN: plain,
        "c = 1/3 (EGSPO-SA's)": stepwise(1 / 3, False),
        "c fitted to earlier batches, gate": stepwise(fit.common(), True),
        "c_t fitted to earlier batches, gate": stepwise(fit.each(), True),
        "c_t = t / m, no gate": stepwise(ramp, False),
        RAMP: stepwise(ramp, True),
    }


def roll_out(model, tokenizer, env, prompts, config, generator):
    """A batch of G completions per prompt: the Rollout, rewards R (B,), step rewards r_t (B, m), scores S (B, m, .)."""
    G = config.num_generations
    ids, mask = (x.repeat_interleave(G, 0) for x in train.encode(tokenizer, env, prompts))
    run = agrpo.rollout(model, ids, mask, config, generator)
    answers = zip(train.decode(tokenizer, run.completion_ids), [p for p in prompts for _ in range(G)])
    R = torch.tensor([env.reward(*answer) for answer in answers], dtype=torch.float64)
    every = torch.ones(len(prompts), dtype=torch.bool)
    r = train.step_rewards(run, tokenizer, env, prompts, chat=False, asked=every).double()
    return run, R, r, step_scores(model, run, config)


def added_by_all(run, S, K, k, A, named, total, config):
    """{sampler: what drawing k timesteps adds to the variance of a batch's gradient}.

    named {name: q (B, m)} are drawn independently and with low discrepancy; the official scheme draws by
    named["entropy"]; allocation batch takes `total` steps in all."""
    found = {}
    for name, q in named.items():
        for kind, stratified in (("independent", False), ("low discrepancy", True)):
            found[f"{name}, {kind}"] = added_by_draws(q, A, K, k, run, config, stratified)
    found[OFFICIAL] = added_by_official(named["entropy"], A, S, K, k, run, config)
    q = agrpo.batch_proposal(run, A, replace(config, importance_sampling="entropy"))
    found[BATCH] = added_by_batch(agrpo.inclusion_probabilities(q, total), A, S)
    return {name: added / len(A) ** 2 for name, added in found.items()}


def measure(model, tokenizer, env, examples, run_config, config, batches, seed):
    """Variances of the gradient sum_j w_j A S (of the sum over steps, without the 1 / m of the loss).

    Returns {"full": {baseline: products (batches, batches) of the full-sum gradients}, "draws": {baseline: {k:
    {sampler: [added by the draws, for each batch]}}}, "evaluations": {k: sequences in the update, official and
    shared}, "coefficients": fitted c_t, "largest_weight": {sampler: over that of a uniform draw}, "completions": B}.
    """
    rng, generator = train.streams(seed, "variance")
    m = config.sampling_steps
    gradients, draws, evaluations, weight, fit = {}, {}, {}, {}, Fit(m)
    running = torch.ones(m, dtype=torch.float64)
    for batch in tqdm(range(batches), leave=False):
        prompts = rng.choices(examples, k=run_config.prompts_per_step)
        run, R, r, S = roll_out(model, tokenizer, env, prompts, config, generator)
        K = torch.einsum("bsp,btp->bst", S, S).double()
        norms, H = K.diagonal(dim1=1, dim2=2).sqrt(), agrpo.step_entropies(run, m)
        doubt = torch.zeros_like(H).scatter_add(1, run.unmask_step, 1 - largest_probabilities(model, run, config))
        advantages = advantages_of(R, r, run.steps_taken, config.num_generations, config, fit)
        plain = advantages[GROUP_MEAN]
        for baseline, A in advantages.items():
            gradients.setdefault(baseline, []).append((A.flatten().float() @ S.flatten(0, 1)) / len(R))
            named, ks = proposals(H, doubt, A, norms, running), [k for k in (1, 2, 4) if k < m]
            if baseline not in (GROUP_MEAN, RAMP):
                named, ks = {"entropy": named["entropy"]}, [k for k in ks if k == 2]
            for name, q in named.items():
                if "A_t" not in name:
                    weight[name] = max(weight.get(name, 0.0), (1 / (m * q.min())).item())
            for k in ks:
                # As many evaluations as the official draws, some of which fall on one step twice, need in the update.
                total = distinct_draws(named["entropy"], plain, k)
                evaluations.setdefault(k, []).append(total)
                for name, added in added_by_all(run, S, K, k, A, named, total, config).items():
                    draws.setdefault(baseline, {}).setdefault(str(k), {}).setdefault(name, []).append(added)
        fit.add(plain, plain - agrpo.stepwise_advantages(R, r, run.steps_taken, config.num_generations, 1.0, True), H)
        running = (running * batch + (plain.abs() * norms).mean(0)) / (batch + 1)
    full = {name: (torch.stack(g) @ torch.stack(g).T).tolist() for name, g in gradients.items()}
    return {
        "full": full,
        "draws": draws,
        "evaluations": {k: sum(counts) / len(counts) for k, counts in evaluations.items()},
        "coefficients": fit.each().tolist(),
        "largest_weight": weight,
        "completions": len(R),
    }
