"""Public functions of `import kd`, for notebooks and other trainers."""
