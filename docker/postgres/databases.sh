#!/bin/bash
# Run once, when PostgreSQL's volume is empty: a database for each service, owned by a user who sees no other.
set -euo pipefail
psql -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "${POSTGRES_DB:-postgres}" <<'SQL'
\getenv airflow_password POSTGRES_AIRFLOW_PASSWORD
\getenv mlflow_password POSTGRES_MLFLOW_PASSWORD
CREATE USER airflow PASSWORD :'airflow_password';
CREATE USER mlflow PASSWORD :'mlflow_password';
CREATE DATABASE airflow OWNER airflow;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
REVOKE CONNECT ON DATABASE airflow, mlflow, mlflow_auth FROM PUBLIC;
SQL
