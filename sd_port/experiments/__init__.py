"""The paper's experiments on the bundled model, on scenes whose truth is known: a figure and a table each."""
