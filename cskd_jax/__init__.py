"""Knowledge distillation via category structure, and the methods it is compared with, in JAX and Flax."""
