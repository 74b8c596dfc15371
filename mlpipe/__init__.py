"""Image-classification workflow: orchestrated by Airflow, tracked by MLflow."""
