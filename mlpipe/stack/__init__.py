"""The whole system on one machine: SeaweedFS, MLflow and Airflow under one supervisor, on loopback only.

Importing this package loads none of them: the command line must answer at once.
"""
