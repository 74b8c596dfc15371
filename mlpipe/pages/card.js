// The latest comparisons, on Airflow's dashboard.
globalThis["mlpipe results"] = function Results() {
  const { createElement: make, useEffect, useState } = globalThis.React;
  const [runs, setRuns] = useState(null);
  useEffect(() => { fetch("/mlpipe-report/image_classification").then((answer) => answer.ok ? answer.json() : Promise.reject()).then(setRuns).catch(() => setRuns("away")); }, []);
  if (!runs) return null;
  const style = { border: "1px solid var(--chakra-colors-border, #8885)", borderRadius: 6, margin: "8px 0", padding: "8px 14px" };
  const link = (run) => make("li", { key: run.dag_run_id, style: { margin: "2px 0" } },
    make("a", { href: `/dags/image_classification/runs/${encodeURIComponent(run.dag_run_id)}/plugin/report`, style: { textDecoration: "underline" } }, run.name), ` (${run.dataset}, ${run.state})`);
  return make("section", { "aria-label": "Latest comparisons", style }, make("h2", { style: { fontWeight: 600 } }, "Latest comparisons"),
    runs === "away" ? make("p", null, "MLflow does not answer.") : runs.length ? make("ul", { style: { listStyle: "none" } }, ...runs.map(link)) : make("p", null, "None yet. Trigger image_classification."));
};
