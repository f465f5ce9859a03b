"""From preference files to packs of tokens. Knows neither models nor objectives."""
