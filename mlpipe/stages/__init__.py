"""What the DAG's tasks do: one module, and one public function in it, for each task.

Stages exchange data through object storage and small dictionaries; any machine can run any of them. Each result is
JSON. They are modules of their own so that a task imports what it needs: torch, Lightning, scikit-learn and matplotlib
take seconds each.
"""
