"""Charts as inline SVG that follow the page's colours, for the report and the dashboard."""
