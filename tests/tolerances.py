"""Every tolerance of the tests, with the reason for its size. Relative unless it says otherwise."""

ROUNDING = 1e-13  # float64: a few hundred roundings of 1e-16, no cancellation
IDENTITY = 1e-10  # float64: an identity between quantities that lose up to six digits by cancellation
QUADRATURE = 1e-8  # scipy's adaptive quadrature on smooth integrands, asked for 1e-10
ROUNDING_32 = 1e-6  # float32: some ten roundings of 6e-8
INVERSE_32 = 1e-5  # float32: t(log_snr(t)) near the data, where a relative error grows by cancellation
RECONSTRUCTION_64 = 1e-13  # record and replay undo each other but for the rounding of one step, which SDEs damp
RECONSTRUCTION_32 = 1e-5  # the same at 6e-8 a rounding
PARITY_32 = 1e-5  # diffusers' float32 tables are good to 1e-6; fifty float32 steps
PARITY_64 = 1e-13  # the same steps on float64 tables: rounding alone
ORDER = 0.2  # distance of a measured slope from the order of the method
STANDARD_ERRORS = 4.0  # Monte Carlo: a right answer fails once in 16000 keys, and the keys are fixed
THEOREM = 1e-9  # Theorem 3.1 on the line: quadrature in space to 1e-11, in time with 16 nodes to 1e-10
THEOREM_PLANE = 1e-8  # the same in the plane, with 51 points per axis and Gaussian
HEAT = 1e-3  # second order in 1/200 cells and 1/100 steps, extrapolated; the Fisher divergence weighs the tails
HEAT_GOLDEN = 5e-4  # published digits were good to 3e-4, the grid of the tests is to 1e-4
ROUNDING_16 = 1e-3  # what is kept as float16 is rounded to 5e-4
PARITY_16 = 2e-2  # networks of some fifty layers in bfloat16 (8 bits) against float32
PIPELINE = 1e-3  # twenty guided steps: guidance enlarges the 1e-6 of a network call, and the steps add up
