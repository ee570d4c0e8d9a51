"""The bundled model: small, on pictures whose truth is known. `StableDiffusion.load("nano")` opens it."""

GUIDANCE = 3.0  # the scale that its pictures are best at; see the model card
