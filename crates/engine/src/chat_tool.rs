//! Tools and tool calls in the form in which vLLM passes them to a chat template.

use minijinja::Value;

/// A function that a request offers to the model, in the fields of OpenAI's schema.
#[derive(Clone, Debug, Default)]
pub(crate) struct FunctionTool {
    pub(crate) name: Value,
    pub(crate) description: Value,
    pub(crate) parameters: Value,
    /// `null` if the request does not set it.
    pub(crate) strict: Value,
    /// `null` if the request does not set it.
    pub(crate) defer_loading: Value,
}

impl FunctionTool {
    /// Reads the fields of a function; a missing field is `null`.
    pub(crate) fn read(function: &Value) -> Self {
        let field = |name| match function.get_attr(name) {
            Ok(value) if !value.is_undefined() => value,
            _ => Value::from(()),
        };
        Self {
            name: field("name"),
            description: field("description"),
            parameters: field("parameters"),
            strict: field("strict"),
            defer_loading: field("defer_loading"),
        }
    }

    /// Returns the tool as SGLang makes it from a tool of another API: it is not strict unless the
    /// request sets that, and the tool itself also has the field `defer_loading`.
    pub(crate) fn into_sglang_tool(mut self) -> Value {
        if self.strict.is_none() {
            self.strict = Value::from(false);
        }
        let defer_loading = self.defer_loading.clone();
        let tool = map_entries(&self.into_tool()).into_iter();
        let defer_loading = (Value::from("defer_loading"), defer_loading);
        Value::from_pairs(tool.chain([defer_loading]).collect::<Vec<_>>())
    }

    /// Returns the tool as a template receives it: the description and the parameters are always
    /// present, and further fields only if the request sets them.
    pub(crate) fn into_tool(self) -> Value {
        let mut function = vec![
            ("name", self.name),
            ("description", self.description),
            ("parameters", self.parameters),
        ];
        let optional = [
            ("strict", self.strict),
            ("defer_loading", self.defer_loading),
        ];
        function.extend(optional.into_iter().filter(|(_, value)| !value.is_none()));
        Value::from_pairs([
            ("type", Value::from("function")),
            ("function", Value::from_pairs(function)),
        ])
    }
}

/// Returns a tool of a chat completion's body as a template receives it: without the fields that
/// OpenAI's schema does not have.
pub(crate) fn normalize_tool(tool: &Value) -> Value {
    let function = tool.get_attr("function").unwrap_or_default();
    FunctionTool::read(&function).into_tool()
}

/// Returns a tool as SGLang passes it to a template: the fields of OpenAI's schema in the order of
/// the body, then the fields that are missing.
pub(crate) fn keep_tool_order(tool: &Value) -> Value {
    const REQUIRED: [&str; 3] = ["description", "name", "parameters"];
    const OPTIONAL: [&str; 2] = ["strict", "defer_loading"];
    let function = tool.get_attr("function").unwrap_or_default();
    let mut fields = map_entries(&function);
    fields.retain(|(key, value)| {
        let key = key.as_str().unwrap_or_default();
        REQUIRED.contains(&key) || OPTIONAL.contains(&key) && !value.is_none()
    });
    for name in REQUIRED {
        if !fields.iter().any(|(key, _)| key.as_str() == Some(name)) {
            fields.push((name.into(), Value::from(())));
        }
    }
    let defer_loading = tool.get_attr("defer_loading").unwrap_or_default();
    Value::from_pairs([
        ("type", Value::from("function")),
        ("function", Value::from_pairs(fields)),
        (
            "defer_loading",
            match defer_loading.is_undefined() {
                true => Value::from(()),
                false => defer_loading,
            },
        ),
    ])
}

/// Returns a call of a function. `function` has its name and its arguments as JSON text, in the
/// order in which a template prints them.
pub(crate) fn tool_call(id: &str, function: [(&str, &str); 2]) -> Value {
    let function = function.map(|(key, value)| (key, Value::from(value)));
    Value::from_pairs([
        ("id", Value::from(id)),
        ("function", Value::from_pairs(function)),
        ("type", Value::from("function")),
    ])
}

/// Returns a tool call whose arguments are an object. The request may contain them as an object or
/// as JSON text; anything else becomes an empty object. A call without `function` is returned
/// unchanged.
pub(crate) fn normalize_tool_call(call: &Value) -> Value {
    replace_field(call, "function", |function| {
        let arguments = function.get_attr("arguments").unwrap_or_default();
        let parsed = match arguments.as_str() {
            Some(json) => serde_json::from_str(json).unwrap_or_default(),
            None => arguments,
        };
        let object = match parsed.kind() {
            minijinja::value::ValueKind::Map => parsed,
            _ => Value::from_pairs(Vec::<(&str, Value)>::new()),
        };
        let mut fields = map_entries(function);
        match fields
            .iter_mut()
            .find(|(key, _)| key.as_str() == Some("arguments"))
        {
            Some((_, value)) => *value = object,
            None => fields.push(("arguments".into(), object)),
        }
        Value::from_pairs(fields)
    })
}

/// Returns the keys and values of a map, in order; none if the value is not a map.
fn map_entries(map: &Value) -> Vec<(Value, Value)> {
    let Ok(keys) = map.try_iter() else {
        return Vec::new();
    };
    keys.map(|key| {
        let value = map.get_item(&key).unwrap_or_default();
        (key, value)
    })
    .collect()
}

/// Returns the map with the value of `name` replaced by `new(value)`, if the map has that key.
fn replace_field(map: &Value, name: &str, new: impl Fn(&Value) -> Value) -> Value {
    let replaced = map_entries(map).into_iter().map(|(key, value)| {
        let value = match key.as_str() {
            Some(key) if key == name => new(&value),
            _ => value,
        };
        (key, value)
    });
    Value::from_pairs(replaced)
}

/// Returns a tool call of a chat completion's body with its fields in the order in which vLLM
/// passes them on: those of OpenAI's schema first.
pub(crate) fn order_tool_call(call: &Value) -> Value {
    let call = with_fields_first(call, &["id", "function", "type"]);
    replace_field(&call, "function", |function| {
        with_fields_first(function, &["arguments", "name"])
    })
}

/// Returns the map with these fields first, in that order, as far as it has them.
fn with_fields_first(map: &Value, names: &[&str]) -> Value {
    let position = |key: &Value| {
        let key = key.as_str();
        let found = names.iter().position(|name| key == Some(name));
        found.unwrap_or(names.len())
    };
    let mut fields = map_entries(map);
    fields.sort_by_key(|(key, _)| position(key));
    Value::from_pairs(fields)
}
