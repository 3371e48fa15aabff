"""Your own optimizer: three rules, each as its paper has it, and what they can do without more.

    python examples/own_transformation.py            # a quarter of a minute on two CPU cores
    python examples/own_transformation.py --quick    # four epochs for each

Lion acts on each number alone. DoG looks at all parameters before it acts on any: it has no learning rate to choose.
SOAP, here on the one side of a matrix, keeps what the shape of a parameter asks for, and renews a part of it now and
then. Each is trained on handwritten digits; `gx.lift` does the rest.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradxform as gx

# One array: Lion (Chen et al. 2023, arXiv 2302.06675), in ten lines


def scale_by_lion(b1=0.9, b2=0.99, state_dtype=None):
    """u ← sign(β₁·m + (1 − β₁)·g),  m ← β₂·m + (1 − β₂)·g"""
    numbers = {"b1": gx.fraction(b1), "b2": gx.fraction(b2)}
    return gx.lift(_lion_start, _lion_step, constructor=scale_by_lion, state_dtype=state_dtype, **numbers)


def _lion_start(param):
    return {"mu": jnp.zeros_like(param)}


def _lion_step(update, state, param, step):
    direction = jnp.sign(step.b1 * state["mu"] + (1 - step.b1) * update)
    return direction, {"mu": step.b2 * state["mu"] + (1 - step.b2) * update}


# All arrays: DoG, distance over gradients (Ivgi et al. 2023, arXiv 2302.12022)


def dog(first=1e-4):
    """θ ← θ − r/√s·g,  r ← max(r, ‖θ − θ₀‖),  s ← s + ‖g‖²: norms of all parameters together; r is `first` at first"""
    return gx.lift(
        _dog_start,
        _dog_step,
        constructor=dog,
        totals=_dog_totals,
        gather=_dog_rate,
        memory={"distance": 0.0, "squares": 0.0},
        reports=("rate",),
        needs_params=True,
        first=gx.positive(first),
    )


def _dog_start(param):
    return {"start": gx.Slot(param, role="kept")}


def _dog_totals(update, state, param, step):
    away = gx.numerics.norm(param - state["start"])
    return {"away": gx.Norm(away), "squares": jnp.sum(update**2)}  # the norm of all leaves, and a sum over them


def _dog_rate(total, step):
    distance = jnp.maximum(jnp.maximum(step.distance, step.first), total["away"])
    squares = step.squares + total["squares"]  # `step` has what the last step remembered
    return {"distance": distance, "squares": squares, "rate": distance / jnp.sqrt(squares + 1e-8)}


def _dog_step(update, state, param, step):
    return -step.rate * update, state


# Each shape its own state: SOAP with the left basis alone (Vyas et al. 2024, arXiv 2409.11321, algorithm 3 and
# section 7.1)


def scale_by_left_soap(b1=0.9, b2=0.99, eps=1e-8, every=10):
    """u ← Q·(Qᵀ·m̂/(√v̂ + ε)),  v ← β₂·v + (1 − β₂)·(Qᵀ·g)²,  Q the eigenvectors of L ← β₂·L + (1 − β₂)·g·gᵀ"""
    return gx.lift(
        _soap_start,
        _soap_step,
        constructor=scale_by_left_soap,
        slots=("mu", "nu", "left", "basis"),
        whole=True,  # a part of a matrix will not do
        b1=gx.fraction(b1),
        b2=gx.fraction(b2),
        eps=gx.positive(eps),
        every=every,
    )


def _soap_start(param):
    moments = {"mu": jnp.zeros_like(param), "nu": jnp.zeros_like(param)}
    if param.ndim != 2:
        return moments
    rows = (0, None)  # on a mesh the first axis is divided as that of the parameter is
    square = jnp.eye(len(param), dtype=param.dtype)
    return {**moments, "left": gx.Slot(0 * square, rows, "kept"), "basis": gx.Slot(square, rows, "kept")}


def _soap_step(update, state, param, step):
    if update.ndim != 2:
        return _adam_step(update, state, step, turn=lambda x: x, back=lambda x: x)
    left = step.b2 * state["left"] + (1 - step.b2) * update @ update.T
    due = (step.number - 1) % step.every == 0
    basis = jax.lax.cond(due, lambda: jnp.linalg.eigh(left)[1], lambda: state["basis"])
    direction, moments = _adam_step(update, state, step, turn=lambda x: basis.T @ x, back=lambda x: basis @ x)
    return direction, {**moments, "left": left, "basis": basis}


def _adam_step(update, state, step, turn, back):
    mu = step.b1 * state["mu"] + (1 - step.b1) * update
    nu = step.b2 * state["nu"] + (1 - step.b2) * turn(update) ** 2
    corrected = mu / (1 - step.b1**step.number), nu / (1 - step.b2**step.number)
    return back(turn(corrected[0]) / (jnp.sqrt(corrected[1]) + step.eps)), {"mu": mu, "nu": nu}


# What comes with them: decay of the weights, schedules, live values, groups, low precision


def lion(learning_rate, b1=0.9, weight_decay=0.0, state_dtype=None):
    """Lion with decay of the weights."""
    decay = gx.add_decoupled_weight_decay(weight_decay, mask="weight")
    return gx.chain(scale_by_lion(b1, state_dtype=state_dtype), decay, gx.scale_by_learning_rate(learning_rate))


def left_soap(learning_rate, every=10):
    """SOAP with the left basis."""
    return gx.chain(scale_by_left_soap(every=every), gx.scale_by_learning_rate(learning_rate))


def train(way, tx, epochs, dtype=jnp.float32, later=None):
    """Softmax regression on handwritten digits, with the hyperparameters `later` in the second half."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(np.float32(x / 16), y, test_size=357, random_state=0)

    def loss_fn(params, x, y):
        logits = x @ params["weight"].astype(x.dtype) + params["bias"].astype(x.dtype)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return gx.apply_updates(params, updates), state

    params = {"weight": jnp.zeros((64, 10), dtype), "bias": jnp.zeros(10, dtype)}
    state = tx.init(params)
    shuffle = np.random.default_rng(0)
    for epoch in range(epochs):
        if later and epoch == epochs // 2:
            state = gx.set_hyperparams(state, later)
        for batch in shuffle.permutation(len(x)).reshape(-1, 48):
            params, state = train_step(params, state, x[batch], y[batch])
    accuracy = np.mean(np.argmax(x_test @ np.float32(params["weight"]) + np.float32(params["bias"]), axis=1) == y_test)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    shown = "".join(f", {name} {value:.2g}" for name, value in gx.metrics(state).items() if name != "nonfinite")
    print(f"{way:44} test accuracy {accuracy:.3f}, {size:5} bytes of state{shown}")


def main(epochs):
    """Train with the three rules, each in several ways."""
    steps, slower = epochs * 30, {"bias": {"learning_rate": gx.times(0.1)}}
    train("Lion", lion(0.01), epochs)
    train("Lion, weights decay", lion(0.01, weight_decay=0.1), epochs)
    train("Lion, learning rate scheduled", lion(optax.cosine_decay_schedule(0.01, steps)), epochs)
    train("Lion, b1 scheduled", lion(0.01, b1=optax.linear_schedule(0.5, 0.95, steps)), epochs)
    train("Lion, learning rate live", lion(gx.live(0.01)), epochs, later={"learning_rate": 0.001})
    train("Lion, the bias at a tenth of the rate", gx.by_path(slower, lion(gx.live(0.01))), epochs)
    train("Lion, bfloat16 parameters", lion(0.01), epochs, dtype=jnp.bfloat16)
    train("Lion, bfloat16 state", lion(0.01, state_dtype=jnp.bfloat16), epochs)
    train("DoG", gx.observe(dog(), of="gradient"), epochs)
    train("DoG, the first step 100 times as long", gx.observe(dog(0.01), of="gradient"), epochs)
    train("DoG, bias frozen", gx.observe(gx.chain(gx.freeze("bias"), dog()), of="gradient"), epochs)
    train("left SOAP", left_soap(0.01), epochs)
    train("left SOAP, learning rate scheduled", left_soap(optax.cosine_decay_schedule(0.03, steps)), epochs)
    train("left SOAP for the weights, Lion for the bias", gx.by_path({"weight": left_soap(0.01)}, lion(0.01)), epochs)


if __name__ == "__main__":
    main(epochs=4 if "--quick" in sys.argv else 30)
